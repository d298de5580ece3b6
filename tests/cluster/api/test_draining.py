"""How an ingress replica ends: what is open when its time is over gets an error, over HTTP too, and nobody waits for
ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer
from virtual_time import run_in_virtual_time

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.draining import EndableEngine, end_when_stopping
from isotherm.cluster.api.engine_client import EngineUnavailableError
from isotherm.cluster.messages.requests import Delta, GenerationRequest, SamplingParams
from isotherm.cluster.text.tokenizer import Tokenizer


def request(tokens: int = 5) -> GenerationRequest:
    return GenerationRequest("r", (1, 2, 3), SamplingParams(tokens, 0.0, seed=0))


async def collect(deltas: AsyncIterator[Delta]) -> list[int]:
    return [token async for delta in deltas for token in delta.token_ids]


def test_it_hands_everything_on():
    engine = FakeEngine(300)
    endable = EndableEngine(engine)
    assert (endable.max_model_len, endable.vocab_size, endable.not_ready()) == (engine.max_model_len, 300, None)

    async def go() -> None:
        assert await endable.status() == await engine.status()
        assert await collect(endable.generate(request())) == await collect(engine.generate(request()))

    run_in_virtual_time(go())
    assert engine.open == set()


def test_open_requests_end_and_new_ones_are_refused():
    engine = FakeEngine(300, delay_s=0.01)
    endable = EndableEngine(engine)

    async def go() -> None:
        task = asyncio.create_task(collect(endable.generate(request(500))))
        await asyncio.sleep(0.1)
        endable.end_all("it is over")
        with pytest.raises(EngineUnavailableError, match="it is over"):
            await asyncio.wait_for(task, 2)
        assert engine.open == set() and engine.closed_early == 1
        assert endable.not_ready() == "it is over"
        with pytest.raises(EngineUnavailableError, match="it is over"):
            await collect(endable.generate(request()))

    run_in_virtual_time(go())


def test_a_reader_that_is_busy_learns_of_it_when_it_asks_for_more():
    """It must not be cancelled in the midst of something of its own: its owner would wait for it for ever."""
    endable = EndableEngine(FakeEngine(300))
    held: list[Delta] = []

    async def read() -> None:
        async for delta in endable.generate(request(500)):
            held.append(delta)
            await asyncio.sleep(0.2)

    async def go() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        endable.end_all("it is over")
        with pytest.raises(EngineUnavailableError, match="it is over"):
            await asyncio.wait_for(task, 2)

    run_in_virtual_time(go())
    assert len(held) == 1


def test_a_reader_that_is_cancelled_stays_cancelled():
    endable = EndableEngine(FakeEngine(300, delay_s=0.01))

    async def go(end: bool) -> None:
        task = asyncio.create_task(collect(endable.generate(request(500))))
        await asyncio.sleep(0.05)
        if end:
            endable.end_all("it is over")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 2)

    run_in_virtual_time(go(end=False))
    run_in_virtual_time(go(end=True))


def test_the_time_begins_when_the_replica_stops():
    engine = EndableEngine(FakeEngine(300))
    stopping: list[bool] = []

    async def go() -> None:
        task = asyncio.create_task(end_when_stopping(engine, lambda: bool(stopping), 0.3))
        await asyncio.sleep(0.5)
        assert engine.not_ready() is None
        stopping.append(True)
        await asyncio.sleep(0.1)
        assert engine.not_ready() is None
        await asyncio.wait_for(task, 2)
        assert "is being stopped or updated" in engine.not_ready() and "0.3 s" in engine.not_ready()

    run_in_virtual_time(go())


def events(url: str, **fields: Any) -> list[str]:
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"model": "m", "prompt": "x", **fields}, timeout=10
    ) as response:
        return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def test_over_http_a_stream_ends_with_an_error_event_and_a_reply_is_a_503(tmp_path: Path):
    endable = EndableEngine(FakeEngine(300, delay_s=0.02))
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/end":
            asyncio.get_running_loop().call_later(1.0, endable.end_all, "it is over")
            scope = {**scope, "path": "/health"}
        await inner(scope, receive, send)

    inner = build_app(endable, tokenizer, "m")
    with http_server(app) as url:
        httpx.get(f"{url}/end")
        seen = events(url, max_tokens=400, stream=True, ignore_eos=True)
        assert json.loads(seen[-1])["error"]["message"] == "it is over" and "[DONE]" not in seen and len(seen) > 2
        body = {"model": "m", "prompt": "x", "max_tokens": 5}
        for stream in (False, True):
            refused = httpx.post(f"{url}/v1/completions", json=body | {"stream": stream})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["message"] == "it is over"
        ready = httpx.get(f"{url}/ready")
        assert ready.status_code == 503 and ready.json()["reason"] == "it is over"


def test_a_request_that_several_tasks_read_in_turn_is_ended_too():
    """As an event stream does, whose first event has a task of its own."""
    engine = FakeEngine(300, delay_s=1.0)
    endable = EndableEngine(engine)

    async def go() -> None:
        deltas = endable.generate(request(500))

        async def one() -> Delta:
            return await anext(deltas)

        await asyncio.create_task(one())
        second = asyncio.create_task(one())
        await asyncio.sleep(0.05)
        endable.end_all("it is over")
        done, _ = await asyncio.wait({second}, timeout=0.5)
        assert done, "it waits for its next token"
        with pytest.raises(EngineUnavailableError, match="it is over"):
            second.result()

    run_in_virtual_time(go())
    assert engine.open == set()
