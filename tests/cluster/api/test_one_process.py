from __future__ import annotations

import asyncio
from typing import Any

from fake_engine import FakeEngine

from isotherm.cluster.api import one_process
from isotherm.cluster.api.one_process import OneProcess


def test_a_server_that_is_one_process(monkeypatch):
    monkeypatch.setattr(one_process, "PERIOD", 0.05)
    engine = FakeEngine(100)
    worker = {"id": "local", "role": "attention", "state": "serving", "tokens": 10, "kv_blocks": 4, "kv_blocks_used": 1}

    async def status() -> dict[str, Any]:
        worker["tokens"] += 5
        return {"workers": [dict(worker)], "nodes": [], "placement_version": None}

    engine.status = status  # type: ignore[method-assign]

    async def follow() -> tuple[Any, Any]:
        source = OneProcess(engine, "m")
        first = await source.feed_part("")
        assert first is not None and await source.feed_part(first.id) is not None
        return first, await source.feed_part("")

    first, later = asyncio.run(follow())
    assert first.values["cluster"]["one_process"] and first.values["cluster"]["controller"]["phase"] == "serving"
    assert first.values["worker/local"]["tokens"] == 15
    samples = [value for name, value in later.values.items() if name.startswith("sample/")]
    assert samples and samples[-1]["tokens_per_second"] > 0 and samples[-1]["kv_used"] == 0.25
