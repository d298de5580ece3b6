"""A real cluster under traffic, a real Prometheus that scrapes it, and every query of the dashboards: each has data.
And what promtool says of the rules and of the scrape.

Run by `make test-metrics`; needs prometheus and promtool on the PATH (Debian: apt-get install prometheus).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from served import Served

from isotherm.cluster.cli.own_cluster import free_port
from isotherm.cluster.client import APIError, Client
from isotherm.manifests.observability.dashboards import DASHBOARDS, FOLDER

pytestmark = pytest.mark.slow
SCRAPE_SECONDS = 2
MANIFEST = {
    "model": "tiny",
    "attention": {"cpus": 0.2},
    "experts": {"groups": 2, "cpus": 0.1},
    "autoscaling": {"mode": "on", "interval": 0.5, "copies": {"above": 1.001, "after": 0.5, "gain": 0.0001}},
}


def promtool(*arguments: str, given: str | None = None) -> str:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_configuration():
    assert f"{len(yaml.safe_load((FOLDER / 'alerts.yaml').read_text())['groups'][0]['rules'])} rules" in promtool(
        "check", "rules", "alerts.yaml"
    )
    promtool("check", "config", "prometheus.yaml")


def test_each_alert_fires_on_what_it_is_for_and_is_silent_before():
    promtool("test", "rules", "alerts_test.yaml")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(MANIFEST, tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def prometheus(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Scrapes the cluster with the rules and the configuration of the repository, only more often."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [served.url.removeprefix("http://")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "alerts.yaml", folder)
    port = free_port()
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not _ready(url):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def asked(prometheus: str, query: str) -> list[Any]:
    """The series that a query gives now."""
    window = f"{8 * SCRAPE_SECONDS}s"
    answer = httpx.get(
        f"{prometheus}/api/v1/query", params={"query": query.replace("$__rate_interval", window)}, timeout=10
    )
    assert answer.status_code == 200, answer.text
    found: list[Any] = answer.json()["data"]["result"]
    return [one for one in found if one["value"][1] != "NaN"]


def traffic(url: str) -> None:
    """Streams, whole replies, and what is refused."""
    with Client(url) as client:
        for chunk in client.chat("Count from 1 to 9.", stream=True, max_tokens=24):
            assert chunk is not None
        client.chat("What is 3 + 4?", max_tokens=16)
        with pytest.raises(APIError):
            client.chat("x", max_tokens=-1)


@pytest.fixture(scope="module")
def under_load(served: Served, prometheus: str) -> str:
    with Client(served.url) as client:
        copies = [{"layer": 1, "expert": 0, "count": 2}]
        client.wait_for_operation(client.scale(copies=copies)["id"], timeout=60)
    end = time.monotonic() + 12 * SCRAPE_SECONDS
    while time.monotonic() < end or not asked(prometheus, "isotherm_autoscaler_decisions_total"):
        traffic(served.url)
        assert time.monotonic() < end + 120, "the autoscaler has decided nothing"
    return prometheus


def queries() -> Iterator[tuple[str, str]]:
    for name in DASHBOARDS:
        for panel in json.loads((FOLDER / f"{name}.json").read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]


def test_promtool_accepts_the_scrape(served: Served, under_load: str):
    """It only warns of names that it would choose otherwise; those are OpenTelemetry's."""
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert done.returncode in (0, 3) and "error" not in done.stderr.lower(), done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("isotherm_")], done.stderr


@pytest.mark.parametrize(("panel", "query"), list(queries()))
def test_every_panel_shows_something(served: Served, under_load: str, panel: str, query: str):
    for _ in range(5):
        if asked(under_load, query):
            return
        traffic(served.url)
    raise AssertionError(f"{panel}: no data for {query}")


def test_prometheus_has_the_rules_and_none_fires_on_a_cluster_that_is_well(under_load: str):
    groups = httpx.get(f"{under_load}/api/v1/rules", timeout=10).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 10 and all(rule["health"] == "ok" for rule in rules), rules
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
