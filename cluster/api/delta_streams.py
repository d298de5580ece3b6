"""The engine's streams of one HTTP request, read side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from isotherm.cluster.api.choices import GenerationError
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.stream import cancelled
from isotherm.cluster.messages.requests import Delta, GenerationRequest


class DeltaStreams:
    def __init__(self, engine: EngineClient, requests: Sequence[GenerationRequest]) -> None:
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(maxsize=2 * len(requests))
        self._tasks = [asyncio.ensure_future(self._pump(engine, i, request)) for i, request in enumerate(requests)]

    async def next(self) -> tuple[int, Delta]:
        """The next delta of any stream. Raises what a stream raised; GenerationError if one ended without a finish
        reason."""
        index, item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return index, item

    async def close(self, index: int) -> None:
        """Ends one stream, and has aborted its request when it returns."""
        await cancelled(self._tasks[index])

    async def aclose(self) -> None:
        await cancelled(*self._tasks)

    async def _pump(self, engine: EngineClient, index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(cast("AsyncGenerator[Delta, None]", engine.generate(request))) as deltas:
                async for delta in deltas:
                    await self._queue.put((index, delta))
                    if delta.finish_reason is not None:
                        return
            raise GenerationError("the engine's stream ended without a finish reason")
        except Exception as error:
            await self._queue.put((index, error))
