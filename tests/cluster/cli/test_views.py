"""Tables and lines in the terminal, at the edges: nothing, very much, and text that looks like rich's markup."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from isotherm.cluster.cli.views import human_count, show_batch_summary, show_report, show_status
from isotherm.cluster.cli.worker_table import worker_table
from isotherm.cluster.client.batch import BatchSummary
from isotherm.cluster.deploy.inspect import Report, inspect_model
from isotherm.cluster.manifest import Manifest, human_bytes
from isotherm.cluster.model.path import bundled_model

HOSTILE = "[red]x[/] [/nothing] [link=a] [b"


@pytest.fixture
def console() -> Console:
    return Console(width=200, record=True, file=io.StringIO())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"),
     (3 << 29, "1.5 GiB"), (1 << 40, "1.0 TiB"), (1 << 60, "1048576.0 TiB")],
)  # fmt: skip
def test_bytes(count: int, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (10**6, "1.0 M"), (671026419200, "671.0 B"), (10**15, "1000000.0 B")],
)
def test_counts(count: int, text: str):
    assert human_count(count) == text


@pytest.fixture(scope="module")
def report() -> Report:
    return inspect_model(bundled_model(), Manifest())


def test_a_report(report: Report, console: Console):
    show_report(report, console)
    shown = console.export_text()
    for words in ("kv lora rank", "FP8 e4m3", "for multi-token prediction", "routed experts", "expert-1"):
        assert words in shown


def test_a_report_without_parts(report: Report, console: Console):
    bare = dataclasses.replace(report, path=HOSTILE, bytes_by_part={}, placement=[],
                               parameters=dict.fromkeys(report.parameters, 0),
                               architecture={"rope": None, "odd": HOSTILE})  # fmt: skip
    show_report(bare, console)
    shown = console.export_text()
    assert shown.count(HOSTILE) == 2 and "0 total, 0 active per token" in shown and "multi-token" not in shown


def status(*workers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    whole = {
        "controller": {"pid": 7, "phase": "serving"},
        "model": {"id": "tiny"},
        "placement_version": 1,
        "workers": list(workers),
        "nodes": [],
    }
    return whole | changes


SHARD = {
    "id": "attention-0", "state": "loaded", "pid": 11, "host": "127.0.0.1", "kernels": "native",
    "links": {"expert-0": "process-group (gloo)"}, "running": 3, "waiting": 1, "kv_blocks_used": 5, "kv_blocks": 100,
    "tokens": 12345,
}  # fmt: skip
GROUP = {"id": "expert-0", "state": "loaded", "pid": 12, "host": "127.0.0.1", "kernels": "native", "experts": 32,
         "weight_bytes": 1 << 20, "pairs": 9, "busy_seconds": 1.5}  # fmt: skip


def test_a_status(console: Console):
    show_status(status(SHARD, GROUP), console)
    shown = console.export_text()
    assert (
        "placement version 1" in shown
        and "3 running, 1 waiting" in shown
        and "KV 5%" in shown
        and "32 experts, 1.0 MiB" in shown
    )
    assert "127.0.0.1  native kernels  links over process-group (gloo)  attention-0 (pid 11)\n" in shown
    assert "127.0.0.1  native kernels  expert-0 (pid 12)\n" in shown


def test_a_status_says_which_batches_wait_for_storage(console: Console):
    waiting = [{"id": f"batch_{i}", "code": "storage_full", "message": "the server's disk is full"} for i in range(5)]
    waiting.append({"id": "batch_a", "code": "storage_unavailable", "message": HOSTILE})
    show_status(status(SHARD, GROUP) | {"waiting_batches": waiting}, console)
    shown = console.export_text()
    assert "batch_0, batch_1, batch_2 and 2 more: the server's disk is full\n" in shown
    assert f"batch_a: {HOSTILE}\n" in shown


def test_a_status_says_what_speculation_came_to(console: Console):
    found = {"kind": "mtp", "drafted": 8, "tried": [4], "accepted": [2], "gain": 1.2, "why": HOSTILE}
    show_status(status(SHARD | {"speculation": found}, GROUP), console)
    assert f"attention-0 drafts by mtp: 25% of 8 were right, gain 1.20; {HOSTILE}\n" in console.export_text()


def test_a_status_fits_80_columns(console: Console):
    load = {"tokens_per_second": 1234.5, "first_token_seconds": 12.25}
    of_group = {"heat": 12.25, "busy": 0.999, "rows_per_second": 123456.0}
    workers = [{**SHARD, "running": 128, "waiting": 128, "load": load, "host": f"10.11.12.{i}"} for i in range(2)]
    workers += [{**GROUP, "id": f"expert-{i}", "weight_bytes": 900 << 30, "load": of_group, "host": f"10.11.13.{i}"}
                for i in range(12)]  # fmt: skip
    narrow = Console(width=80, record=True, file=io.StringIO())
    narrow.print(worker_table(workers, 80))
    text = narrow.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "128 running, 128 waiting" in text
    assert "123456 rows/s" in text and "32 experts, 900.0 GiB" in text and "…" not in text, "nothing is cut"


def test_nodes_of_a_status(console: Console):
    nodes = [{"id": f"ab{i}", "address": "10.0.0.9", "alive": i < 2, "drained": i > 0} for i in range(3)]
    show_status(status(nodes=nodes), console)
    shown = [line.split("  ")[1:] for line in console.export_text().splitlines() if line.startswith("node")]
    assert shown == [["10.0.0.9"], ["10.0.0.9", "drained"], ["10.0.0.9", "dead, drained"]]


def test_a_status_at_the_start_and_of_the_dead(console: Console):
    show_status(status(placement_version=None, controller={"pid": 7, "phase": HOSTILE}, model={"id": HOSTILE}), console)
    dead = {"id": "expert-1", "state": "dead", "pid": None, "reason": HOSTILE}
    loading = {
        "id": "attention-1",
        "state": "loading",
        "pid": 13,
        "host": "127.0.0.1",
        "kernels": "native",
        "links": {},
    }
    show_status(status(dead, loading), console)
    shown = console.export_text()
    assert shown.count(HOSTILE) == 3 and "no placement yet" in shown and "None" not in shown.split("dead")[1]


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (BatchSummary(), "0 of 0 rows done"),
        (BatchSummary(total=5, resumed=2, completed=3), "5 of 5 rows done (2 from an earlier run), 0 with an error"),
        (BatchSummary(total=5, completed=3, failed=1, unfinished=2, reason=HOSTILE),
         f"3 of 5 rows done (0 from an earlier run), 1 with an error, "
         f"2 left: {HOSTILE}"),
    ],
)  # fmt: skip
def test_a_batch(summary: BatchSummary, text: str, console: Console):
    show_batch_summary(summary, console)
    assert text in console.export_text()
