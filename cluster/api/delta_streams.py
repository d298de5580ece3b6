"""The engine's streams of one HTTP request, read side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from isotherm.cluster.api.choices import GenerationError
from isotherm.cluster.api.deadline import Deadline
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.stream import cancelled
from isotherm.cluster.messages.requests import Delta, GenerationRequest

AT_ONCE = 4  # deltas of an only stream that are there already, after which others have their turn
ENDED = "the engine's stream ended without a finish reason"


class DeltaStreams:
    """Each stream has a task that reads it, unless it is the only one and has no deadline: then whoever asks for the
    next delta does."""

    def __init__(self, engine: EngineClient, requests: Sequence[GenerationRequest], deadline: Deadline) -> None:
        self._only: AsyncGenerator[Delta, None] | None = None
        self._given = 0
        self._tasks: list[asyncio.Task[None]] = []
        if len(requests) == 1 and deadline.at is None:
            self._only = _deltas(engine, requests[0])
            return
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(maxsize=2 * len(requests))
        self._tasks = [asyncio.ensure_future(self._pump(engine, i, request)) for i, request in enumerate(requests)]
        self._deadline, self._read = deadline, 0
        self._call_off = deadline.watch(self._over)

    async def next(self) -> tuple[int, Delta]:
        """The next delta of any stream. Raises what a stream raised; GenerationError if one ended without a finish
        reason, DeadlineError when their time is over."""
        if self._only is not None:
            self._given += 1
            if self._given % AT_ONCE == 0:
                await asyncio.sleep(0)
            async for delta in self._only:
                return 0, delta
            raise GenerationError(ENDED)
        index, item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        self._read += len(item.token_ids)
        return index, item

    async def close(self, index: int) -> None:
        """Ends one stream, and has aborted its request when it returns."""
        if self._only is not None:
            await self._only.aclose()
        else:
            await cancelled(self._tasks[index])

    async def aclose(self) -> None:
        if self._only is not None:
            await self._only.aclose()
            return
        self._call_off()
        await cancelled(*self._tasks)

    def _over(self) -> None:
        for task in self._tasks:
            task.cancel()
        while not self._queue.empty():
            self._queue.get_nowait()
        had = f"it had {self._read} tokens" if self._read else "it was waiting for its first token"
        self._queue.put_nowait((0, self._deadline.error(had)))

    async def _pump(self, engine: EngineClient, index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(_deltas(engine, request)) as deltas:
                async for delta in deltas:
                    await self._queue.put((index, delta))
                    if delta.finish_reason is not None:
                        return
            raise GenerationError(ENDED)
        except Exception as error:
            await self._queue.put((index, error))


def _deltas(engine: EngineClient, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    return cast("AsyncGenerator[Delta, None]", engine.generate(request))
