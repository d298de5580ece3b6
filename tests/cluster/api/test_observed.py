"""The routes of those who watch."""

from __future__ import annotations

import asyncio

import httpx
from fake_observer import FakeObserver

from isotherm.cluster.api.app import build_app


def get(app, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_metrics_are_text_that_prometheus_takes(engine, tokenizer):
    answer = get(build_app(engine, tokenizer, "m", observer=FakeObserver()), "/metrics")
    assert answer.text == "isotherm_placement_version 3.0\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_without_an_observer_there_is_nothing_to_see(engine, tokenizer):
    watched, bare = build_app(engine, tokenizer, "m", observer=FakeObserver()), build_app(engine, tokenizer, "m")
    assert get(watched, "/admin/requests").json() == {"running": [], "recent": []}
    assert get(bare, "/admin/requests").status_code == get(bare, "/metrics").status_code == 404
