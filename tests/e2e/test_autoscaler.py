"""The autoscaler in a real cluster: heat evens out by itself under traffic, and no token changes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from loaded import kill_controller
from prometheus_client.parser import text_string_to_metric_families
from served import Served, generate
from skewed import skewed_checkpoint

from isotherm.cluster.client import Client

PROMPTS = [f"{i} and {i * i}" for i in range(16)]
TOKENS = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return skewed_checkpoint(tmp_path_factory.mktemp("skewed") / "skewed")


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    manifest = {
        "model": str(model), "attention": {"cpus": 0.2}, "experts": {"groups": 2, "cpus": 0.1},
        "autoscaling": {"interval": 0.5, "half_life": 4.0, "copies": {"after": 1.0, "cooldown": 2.0}},
    }  # fmt: skip
    with Served(manifest, tmp_path_factory.mktemp("autoscaler")) as cluster:
        yield cluster


def get(served: Served, path: str) -> dict[str, Any]:
    return httpx.get(f"{served.url}{path}", timeout=30).raise_for_status().json()


async def texts(url: str) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=100) as client:
        bodies = [
            {"model": "skewed", "prompt": p, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            for p in PROMPTS
        ]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        return [answer.raise_for_status().json()["choices"][0]["text"] for answer in answers]


def test_heat_evens_out_by_itself_and_no_token_changes(served, model):
    alone = generate(
        str(model), "--prompt", PROMPTS[7], "--max-tokens", str(TOKENS), "--temperature", "0", "--ignore-eos"
    )["text"]
    with Client(served.url) as client:
        before = client.experts()
        assert before["placement_version"] == 1
        first = asyncio.run(texts(served.url))
        assert first[7] == alone
        deadline = time.monotonic() + 30
        while True:
            assert asyncio.run(texts(served.url)) == first
            now = client.experts()
            if now["placement_version"] > 1 and max(now["heat"].values()) < 1.2:
                break
            assert time.monotonic() < deadline, get(served, "/admin/autoscaler")
        done = [o for o in get(served, "/admin/operations")["operations"] if o["phase"] == "done"]
        assert done and all(o["origin"] == "autoscaler" and "hottest group" in o["reasons"][0] for o in done)


def test_what_it_did_is_shown(served):
    report = get(served, "/admin/autoscaler")
    decision = report["decisions"][0]
    assert (report["mode"], decision["kind"], decision["result"]) == ("on", "copies", "done")
    assert decision["figures"]["imbalance"] > decision["figures"]["imbalance_expected"] and decision["operations"]
    assert {g["name"] for g in report["groups"]} == {"expert-0", "expert-1"} and all(
        g["rows_per_second"] > 0 for g in report["groups"]
    )
    (shard,) = report["shards"]
    assert shard["tokens_per_second"] > 0 and shard["first_token_seconds"] > 0
    assert served.status()["autoscaler"]["decisions"] >= 1


def test_prometheus_can_scrape_it(served):
    answer = httpx.get(f"{served.url}/metrics", timeout=30)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    found = {s.name: s.value for family in text_string_to_metric_families(answer.text) for s in family.samples}
    assert found["isotherm_placement_version"] > 1 and found["isotherm_shard_tokens_per_second"] > 0
    assert found["isotherm_autoscaler_decisions_total"] >= 1
    for name in "gen_ai_server_time_to_first_token_seconds_count", "isotherm_step_exchange_wait_seconds_sum":
        assert found[name] > 0, name


def test_rays_own_prometheus_sees_it(served):
    """At every node of Ray, as it tells Prometheus where these are."""
    listing = served.ray_folder() / "prom_metrics_service_discovery.json"
    wanted = "ray_isotherm_placement_version", "ray_gen_ai_server_time_to_first_token_seconds_bucket"
    deadline, text = time.monotonic() + 60, ""
    while not all(name in text for name in wanted) and time.monotonic() < deadline:
        time.sleep(1)
        targets = [target for entry in json.loads(listing.read_text()) for target in entry["targets"]]
        text = "".join(httpx.get(f"http://{target}/metrics", timeout=10).text for target in targets)
    found = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
    assert all(name in found for name in wanted), sorted(found)[:20]
    assert found["ray_isotherm_placement_version"].value >= 1


def test_an_operator_is_not_in_its_way(served):
    """Copies that an operator sets stay as they are, under traffic."""
    with Client(served.url) as client:
        coldest = len(client.experts()["layers"][0]["rows"]) - 1
        copies = [{"layer": 1, "expert": coldest, "count": 2}]
        assert client.wait_for_operation(client.scale(copies=copies)["id"], timeout=60)["phase"] == "done"
        for _ in range(3):
            asyncio.run(texts(served.url))
        assert client.experts()["layers"][0]["copies"][coldest] == 2
    handed_back = served.command("scale", "--url", served.url, "--copies", f"1:{coldest}=auto", "--wait")
    assert handed_back.returncode == 0 and "leave the copies of 1 experts to the autoscaler" in handed_back.stdout, (
        handed_back
    )


def test_what_it_decided_outlives_the_controller(served):
    before = get(served, "/admin/autoscaler")["decisions"]
    kill_controller(served)
    assert get(served, "/admin/autoscaler")["decisions"][: len(before)] == before
    assert served.status()["autoscaler"]["decisions"] >= len(before)
