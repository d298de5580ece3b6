"""How an ingress replica ends: it finishes the requests that it has, and those that are open when its time is over end
with an error, never silently."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

from isotherm.cluster.api.engine_client import EngineClient, EngineUnavailableError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import Delta, GenerationRequest

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.2  # from one look whether the replica stops to the next


class EndableEngine:
    """EngineClient that hands everything on, and can end all open requests from outside. It costs a request, not a
    token: each is read by one task from beginning to end, and that task is interrupted."""

    def __init__(self, engine: EngineClient):
        self._engine = engine
        # Readers that wait for a delta; others look at `_reason` before they do.
        self._waiting: set[asyncio.Task[Any]] = set()
        self._interrupted: set[asyncio.Task[Any]] = set()
        self._reason: str | None = None

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    @property
    def system_fingerprint(self) -> str:
        return self._engine.system_fingerprint

    def capacity(self) -> int:
        return self._engine.capacity()

    def token_capacity(self) -> int:
        return self._engine.token_capacity()

    def not_ready(self) -> str | None:
        return self._reason or self._engine.not_ready()

    async def held_up(self) -> str | None:
        return self._reason or await self._engine.held_up()

    async def status(self) -> JSON:
        return await self._engine.status()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """As EngineClient says. Raises EngineUnavailableError, also after the first delta, when it is ended from
        outside."""
        if self._reason is not None:
            raise EngineUnavailableError(self._reason)
        reader = asyncio.current_task()
        assert reader is not None
        try:
            async with aclosing(cast("AsyncGenerator[Delta, None]", self._engine.generate(request))) as deltas:
                self._waiting.add(reader)
                async for delta in deltas:
                    self._waiting.discard(reader)
                    yield delta
                    if self._reason is not None:
                        raise EngineUnavailableError(self._reason)
                    # Whoever asks for the next one need not be who asked for this.
                    reader = asyncio.current_task()
                    assert reader is not None
                    self._waiting.add(reader)
        except asyncio.CancelledError:
            if reader not in self._interrupted or self._cancelled_besides(reader):
                raise
            raise EngineUnavailableError(self._reason) from None
        finally:
            self._waiting.discard(reader)
            self._interrupted.discard(reader)

    @staticmethod
    def _cancelled_besides(reader: asyncio.Task[Any]) -> bool:
        """Whether its client has gone in the same moment: Python counts, from 3.11 on, how often a task was
        cancelled."""
        return hasattr(reader, "uncancel") and reader.uncancel() > 0

    def end_all(self, reason: str) -> None:
        """End every open request, and refuse those that still come."""
        self._reason = reason
        for reader in list(self._waiting):
            self._interrupted.add(reader)
            reader.cancel()


async def end_when_stopping(engine: EndableEngine, stopping: Callable[[], bool], seconds: float) -> None:
    """Wait until `stopping`, then `seconds` more, and end what is open then."""
    while not stopping():
        await asyncio.sleep(LOOK_SECONDS)
    log.info("this replica stops; its open requests have %g s to finish", seconds)
    await asyncio.sleep(seconds)
    engine.end_all(
        "this server is being stopped or updated, and the request was not finished in the "
        f"{seconds:g} s that were left; ask again"
    )
