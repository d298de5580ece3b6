"""The engine of this process as the front door sees it: refusals, aborts, ends. The engine does not compute."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isotherm.actors.attention.engine import Engine
from isotherm.cluster.api.engine_client import EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Sampled
from isotherm.cluster.local import engine as local_engine
from isotherm.cluster.local.engine import LocalEngine
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams


class Counting:
    """Each request's tokens are 0, 1, 2, …; a step that computes waits for `gate`."""

    def __init__(self, **config: Any) -> None:
        self.scheduler = Scheduler(SchedulerConfig(4, 64, 64, 8, 64, **config))
        self.model = SimpleNamespace(kernels=SimpleNamespace(name="none"))
        self.speculation = None
        self.steps = 0
        self.gate = threading.Event()
        self.gate.set()

    def step(self) -> list[Delta]:
        chunks = self.scheduler.schedule()
        assert not chunks or self.gate.wait(20)
        self.steps += bool(chunks)
        return self.scheduler.complete(chunks, [Sampled(c.sequence.generated) for c in chunks if c.sample])


def request(name: str, tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(name, (1, 2, 3), SamplingParams(tokens))


async def _all(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


async def collected(local: LocalEngine, asked: GenerationRequest) -> list[int]:
    return [token async for delta in local.generate(asked) for token in delta.token_ids]


def run(test, **config: Any) -> Any:
    async def go() -> Any:
        engine = Counting(**config)
        local = LocalEngine(cast(Engine, engine), 100, "f", "asked for")
        try:
            return await test(local, engine)
        finally:
            engine.gate.set()
            local.close()

    return asyncio.run(go())


def test_requests_get_their_own_tokens():
    async def test(local, engine):
        found = await asyncio.gather(*(collected(local, request(f"r{i}", 5 + i)) for i in range(6)))
        assert found == [list(range(5 + i)) for i in range(6)]
        (worker,) = (await local.status())["workers"]
        assert worker["tokens"] == sum(5 + i for i in range(6)) and worker["kv_blocks_used"] == 0
        assert (local.max_model_len, local.vocab_size, local.system_fingerprint) == (64, 100, "f")
        assert local.not_ready() is None

    run(test)


def test_a_stream_that_is_left_is_aborted():
    async def test(local, engine):
        stream = local.generate(request("r", 50))
        assert (await anext(stream)).token_ids
        await stream.aclose()
        for _ in range(1000):
            if not len(engine.scheduler):
                break
            await asyncio.sleep(0.01)
        assert not len(engine.scheduler) and not local._open

    run(test)


def test_more_than_may_wait_are_refused():
    async def test(local, engine):
        assert local.capacity() == 8 + 2
        engine.gate.clear()
        tasks = [asyncio.ensure_future(collected(local, request(f"r{i}"))) for i in range(20)]
        while not any(task.done() for task in tasks):
            engine.gate.set()  # requests are taken between steps
            await asyncio.sleep(0.01)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [one for one in found if isinstance(one, EngineOverloadedError)]
        assert refused and all(one == [0, 1, 2, 3, 4] for one in found if one not in refused)

    run(test, max_waiting=2)


def test_where_nothing_limits_the_queue_any_number_may_wait():
    async def test(local, engine):
        assert local.capacity() > 1 << 40 and (await local.status())["workers"][0]["kernels_reason"] == "asked for"

    run(test, max_waiting=None)


def test_a_stream_that_nobody_reads_ends(monkeypatch):
    monkeypatch.setattr("isotherm.cluster.api.engine_client.MOST_UNREAD", 10)

    async def test(local, engine):
        stream = local.generate(request("r", 60))
        deltas = [await anext(stream)]
        while len(engine.scheduler):
            await asyncio.sleep(0.01)
        deltas += [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.ERROR and "too slowly" in deltas[-1].error
        assert len(deltas) < 20
        assert not local._open

    run(test)


def test_closing_ends_open_streams_with_an_error():
    async def test(local, engine):
        stream = local.generate(request("r", 50))
        await anext(stream)
        engine.gate.set()
        local.close()
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)
        assert local.not_ready() == "the engine was closed"
        with pytest.raises(EngineUnavailableError, match="closed"):
            await collected(local, request("s"))

    run(test)


def test_an_engine_whose_thread_has_failed_ends_open_streams_and_takes_no_more():
    async def test(local, engine):
        def gone() -> list[Delta]:
            raise SystemExit("no step gets past this")

        engine.step = gone
        stream = local.generate(request("r"))
        [delta] = await asyncio.wait_for(_all(stream), 20)
        assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "the engine's thread has failed")
        assert local.not_ready() == "the engine's thread has failed"
        with pytest.raises(EngineUnavailableError, match="failed"):
            await collected(local, request("s"))

    run(test)


def test_it_is_held_up_while_a_step_does_not_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_engine, "HELD_UP_SECONDS", 0.2)

    async def test(local: LocalEngine, engine: Counting) -> None:
        assert await local.held_up() is None, "idle"
        engine.gate.clear()
        work = asyncio.ensure_future(collected(local, request("a")))
        while not engine.scheduler.running:
            await asyncio.sleep(0.01)
        assert await local.held_up() == "the engine has not finished a step for 0.2 s"
        engine.gate.set()
        assert await work == [0, 1, 2, 3, 4] and await local.held_up() is None

    run(test)
