"""An engine of this process as the front door knows engines: requests in from an event loop, deltas back to it, the
steps in a thread between. Knows nothing about HTTP or Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import asdict

import numpy as np

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.step_loop import StepLoop
from isotherm.cluster.api.engine_client import (
    HELD_UP_SECONDS,
    EngineOverloadedError,
    EngineUnavailableError,
    hand_over,
)
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.meters import ShardMeter
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest
from isotherm.cluster.messages.workers import ATTENTION

_NO_ROWS = np.zeros((0, 0), dtype=np.int64)  # experts of this process are not counted one by one


class LocalEngine:
    """`EngineClient` over an engine. Made and used on one event loop. `fingerprint`: what replies have as their
    system_fingerprint. `kernels_reason`: why these kernels."""

    def __init__(self, engine: Engine, vocab_size: int, fingerprint: str, kernels_reason: str) -> None:
        self.vocab_size, self.system_fingerprint = vocab_size, fingerprint
        self._kernels_reason = kernels_reason
        self.max_model_len = engine.scheduler.config.max_model_len
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, asyncio.Queue[Delta]] = {}
        self._tokens = 0
        self._closed = self._failed = False
        self._steps = StepLoop(engine, self._publish, vital=False, ended=self._tell_end)

    @property
    def closed(self) -> bool:
        return self._closed

    def not_ready(self) -> str | None:
        if self._closed:
            return "the engine was closed"
        return "the engine's thread has failed" if self._failed else None

    async def held_up(self) -> str | None:
        gone_on = asyncio.Event()
        self._steps.between_steps(lambda: self._tell(gone_on))
        try:
            await asyncio.wait_for(gone_on.wait(), HELD_UP_SECONDS)
        except asyncio.TimeoutError:
            return f"the engine has not finished a step for {HELD_UP_SECONDS:g} s"
        return None

    def _tell(self, event: asyncio.Event) -> None:
        """For the engine's thread."""
        self._loop.call_soon_threadsafe(event.set)

    def capacity(self) -> int:
        return self._steps.engine.scheduler.config.room.requests

    def token_capacity(self) -> int:
        return self._steps.engine.scheduler.config.room.tokens

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        if (reason := self.not_ready()) is not None:
            raise EngineUnavailableError(reason)
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._open[request.id] = deltas
        finished = False
        try:
            self._steps.submit(request)
            while not finished:
                delta = await deltas.get()
                finished = delta.finish_reason is not None
                if delta.finish_reason is FinishReason.REFUSED:
                    raise EngineOverloadedError(delta.error)
                yield delta
        finally:
            self._open.pop(request.id, None)
            if not finished:
                self._steps.abort(request.id)

    async def status(self) -> JSON:
        """The one worker, with the names that an attention shard's status has."""
        engine = self._steps.engine
        scheduler = engine.scheduler
        worker: JSON = {
            "id": "local",
            "role": ATTENTION,
            "state": "serving" if self.not_ready() is None else "ended",
            "pid": os.getpid(),
            "kernels": engine.model.kernels.name,
            "kernels_reason": self._kernels_reason,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_blocks_used": scheduler.blocks.used,
            "kv_blocks": scheduler.blocks.blocks,
            "steps": engine.steps,
            "tokens": self._tokens,
        }
        if engine.speculation is not None:
            worker["speculation"] = asdict(engine.speculation.meter())
        return {"workers": [worker], "nodes": [], "placement_version": None}

    def meter(self) -> ShardMeter:
        """As that of a shard of a cluster. From any thread."""
        engine = self._steps.engine
        scheduler = engine.scheduler
        return ShardMeter(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            capacity=scheduler.config.max_sequences,
            kv_used=scheduler.blocks.used / scheduler.blocks.blocks,
            tokens=self._tokens,
            steps=engine.steps,
            first_token_seconds=None,
            longest_wait=0.0,
            group_wait={},
            rows_routed=_NO_ROWS,
            reads=_NO_ROWS,
            figures=engine.figures.read(scheduler, engine.speculation),
        )

    def close(self) -> None:
        """End the thread, and what is open with an error. Waits for the step that is computed: it must find the event
        loop."""
        self._closed = True
        self._steps.close()
        self._steps.thread.join()
        self._end_open("the engine was closed")

    def _tell_end(self) -> None:
        """For the engine's thread."""
        self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        if not self._closed:
            self._failed = True
            self._end_open("the engine's thread has failed")

    def _end_open(self, why: str) -> None:
        for request_id, deltas in self._open.items():
            deltas.put_nowait(Delta(request_id, 0, finish_reason=FinishReason.ERROR, error=why))

    def _publish(self, deltas: list[Delta]) -> None:
        self._loop.call_soon_threadsafe(self._route, deltas)

    def _route(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._tokens += len(delta.token_ids)
            queue = self._open.get(delta.request_id)
            if queue is not None and not hand_over(delta, queue):
                del self._open[delta.request_id]
                self._steps.abort(delta.request_id)
