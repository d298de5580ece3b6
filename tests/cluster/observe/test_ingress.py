"""What an ingress replica hands on, and what it can say while there is no controller."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from request_records import record
from starlette.requests import Request

from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.observe import ingress
from isotherm.cluster.observe.ingress import IngressObserver


class Others:
    def __init__(self) -> None:
        self.gone = False
        self.reports: list = []
        self.known: dict = {}

    def _check(self) -> None:
        if self.gone:
            raise WorkerGoneError("no controller")

    async def report(self, name, figures, requests) -> None:
        self._check()
        self.reports.append((name, figures, requests))

    async def metrics(self, name, figures) -> str:
        self._check()
        return f"{name} {len(figures)}"

    async def requests(self) -> dict:
        self._check()
        return self.known


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def observer(others) -> IngressObserver:
    return IngressObserver("one", others)


def asked(**state: str) -> Request:
    return Request({"type": "http", "path": "/v1/completions", "state": state})


def ended(observer: IngressObserver, request_id: str) -> None:
    with observer.book.open(asked(request_id=request_id)):
        pass


def test_a_scrape_is_answered_by_the_controller_with_this_replicas_newest_figures(observer):
    assert asyncio.run(observer.metrics()) == f"one {len(observer.figures())}"


def test_without_a_controller_it_tells_its_own(observer, others):
    others.gone = True
    ended(observer, "a")
    families = {f.name: f for f in text_string_to_metric_families(asyncio.run(observer.metrics()))}
    assert families["isotherm_controller_reachable"].samples[0].value == 0
    assert families["isotherm_requests"].samples[0].labels["ingress"] == "one"
    assert "isotherm_ready" not in families


def test_a_controller_that_is_slow_to_come_back_is_not_waited_for(observer, others, monkeypatch):
    monkeypatch.setattr("isotherm.cluster.observe.ingress.PATIENCE", 0.05)

    async def never(*_: Any) -> str:
        await asyncio.sleep(60)
        return ""

    others.metrics = others.requests = never
    ended(observer, "a")
    assert "isotherm_controller_reachable 0" in asyncio.run(observer.metrics())
    assert [one["id"] for one in asyncio.run(observer.requests())["recent"]] == ["a"]


def test_requests_of_all_replicas_the_newest_first(observer, others):
    ended(observer, "mine")
    other = record(id="theirs", started=0.0).as_json()
    others.known = {"one": {"running": [], "recent": ["outdated"]}, "two": {"running": [other], "recent": [other]}}
    found = asyncio.run(observer.requests())
    assert [one["id"] for one in found["recent"]] == ["mine", "theirs"]
    assert [one["id"] for one in found["running"]] == ["theirs"]
    others.gone = True
    assert [one["id"] for one in asyncio.run(observer.requests())["recent"]] == ["mine"]


def test_it_reports_what_is_new(observer, others, monkeypatch):
    monkeypatch.setattr(ingress, "REPORT_SECONDS", 0.01)

    async def go() -> None:
        reporting = asyncio.ensure_future(observer.keep_reporting())
        await asyncio.sleep(0.02)
        others.gone = True
        ended(observer, "a")
        await asyncio.sleep(0.05)
        others.gone = False
        await asyncio.sleep(0.05)
        reporting.cancel()

    asyncio.run(go())
    assert others.reports[0][2] == {"running": [], "recent": []}
    name, figures, requests = others.reports[-1]
    assert name == "one" and [one["id"] for one in requests["recent"]] == ["a"] and figures == observer.figures()


def test_it_reports_batches_that_wait_for_storage_and_that_they_do_no_more(observer, others, monkeypatch):
    monkeypatch.setattr(ingress, "REPORT_SECONDS", 0.01)
    waiting = [{"id": "batch_1", "code": "storage_full", "message": "full"}]

    async def go() -> None:
        reporting = asyncio.ensure_future(observer.keep_reporting())
        for now in ([], waiting, []):
            observer.waiting_batches = lambda now=now: now
            await asyncio.sleep(0.03)
        reporting.cancel()

    asyncio.run(go())
    assert [requests.get("waiting_batches") for _, _, requests in others.reports] == [None, waiting, None]


def test_a_manifest_without_traces_needs_no_opentelemetry(others):
    observer = IngressObserver.of(parse_manifest({}), "one", others)
    with observer.book.open(asked()):
        pass
    assert observer.book.recent()[0].trace is None
