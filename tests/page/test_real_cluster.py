"""The page of a real cluster: shards and groups on Ray, under load."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pages import DESKTOP, ask, shot
from playwright.sync_api import expect
from served import Served

from isotherm.cluster.client import Client, ClientError

PATIENCE = 120_000  # milliseconds; workers load


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    manifest = {
        "attention": {"cpus": 0.2},
        "experts": {"cpus": 0.1},
        "liveness": {"timeout": 10.0},
        "autoscaling": {"mode": "advise", "interval": 0.5},
    }
    cluster = Served(manifest, tmp_path_factory.mktemp("page"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


@contextmanager
def under_load(url: str, streams: int = 3) -> Iterator[list[str]]:
    """Chats that follow each other; gives the errors that they had."""
    over, errors = threading.Event(), []  # type: ignore[var-annotated]

    def talk(number: int) -> None:
        with Client(url) as client:
            while not over.is_set():
                try:
                    client.chat(f"Tell me a story about the number {number}.", max_tokens=64, seed=number)
                except ClientError as error:
                    errors.append(str(error))

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_cluster_from_its_first_answer_to_a_worker_that_was_killed(served, window):
    page = window.open(served.url, "chat", DESKTOP)
    ask(page, "What is 3 + 4?")
    expect(page.locator(".said.model footer .facts")).to_contain_text("tokens", timeout=PATIENCE)
    assert page.locator(".said.model > .markdown").inner_text().strip()
    page.goto(f"{served.url}/#cluster")
    canvas = page.locator("canvas")
    expect(canvas).to_have_attribute("aria-label", "Heat of 64 experts in 4 layers", timeout=PATIENCE)
    groups = page.locator(".worker.expert")
    count = groups.count()
    with under_load(served.url) as errors:
        # The heat map moves.
        still = canvas.get_attribute("data-hot") or ""
        expect(canvas).not_to_have_attribute("data-hot", still, timeout=PATIENCE)
        expect(page.locator(".flow-band").first).to_be_visible(timeout=PATIENCE)
        shot(page, "cluster-served")

        # A scale, from the page.
        page.goto(f"{served.url}/#operate")
        panel = page.get_by_role("region", name="Scale", exact=True)
        expect(panel).to_contain_text(f"now {count}", timeout=PATIENCE)
        panel.get_by_role("button", name="Expert groups: one more").click()
        panel.get_by_role("button", name="Show the plan").click()
        expect(panel.locator(".plan li").first).to_be_visible(timeout=PATIENCE)
        panel.get_by_role("button", name="Carry it out").click()
        expect(panel.locator(".operation")).to_have_attribute("data-phase", "done", timeout=PATIENCE)
        expect(panel).to_contain_text(f"now {count + 1}", timeout=PATIENCE)
        shot(page, "operate-served")

        # A worker that is killed is shown, and replaced.
        page.goto(f"{served.url}/#cluster")
        expect(groups).to_have_count(count + 1, timeout=PATIENCE)
        killed = next(w for w in served.status()["workers"] if w["role"] == "expert")
        os.kill(killed["pid"], signal.SIGKILL)
        expect(page.locator(".worker.lost h4")).to_have_text(killed["id"], timeout=PATIENCE)
        expect(page.locator(".notice")).to_contain_text(f"{killed['id']} is dead")
        expect(page.locator(".worker.lost")).to_have_count(0, timeout=PATIENCE)
        expect(page.locator(".notice")).to_be_hidden(timeout=PATIENCE)
        expect(page.locator(".worker.expert.well")).to_have_count(count + 1, timeout=PATIENCE)
        assert killed["id"] not in groups.all_inner_texts()
    assert errors == []
