"""GET /admin/events: what happens in the cluster, as a stream of server-sent events that can be taken up again. Knows
nothing about what is told."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.access.middleware import may_still_of
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.error_forms import error_body
from isotherm.cluster.api.errors import ReplyError, internal_error, unavailable
from isotherm.cluster.api.replies import COMMENT, sse
from isotherm.cluster.api.stream import EventStream
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.feed import FeedPart, FeedTable
from isotherm.cluster.messages.membership import WorkerGoneError

MAX_STREAMS = 64  # of one process
FIRST_SECONDS = 10.0  # in which the first part comes, or the stream begins without it
LOOK_SECONDS = 0.5  # from one look whether this server ends to the next
PERIOD = 1.0  # seconds between two looks at a server that is one process
HISTORY = 300  # looks that are kept
PATH = "/admin/events"


class FeedSource(Protocol):
    """Where the parts come from."""

    async def feed_part(self, last: str) -> FeedPart | None:
        """What is new since the part whose id is `last`; waits a while for it, and gives None where nothing comes.
        Raises WorkerGoneError where what is told cannot be known now."""


class OneProcess:
    """FeedSource of a server that is one process: what its engine says of itself, looked at while somebody listens."""

    def __init__(self, engine: EngineClient, model: str) -> None:
        self._engine = engine
        self._table = FeedTable(uuid.uuid4().hex[:12])
        self._head = {"model": {"id": model, "max_model_len": engine.max_model_len}, "one_process": True}
        self._looked = float("-inf")
        self._before: tuple[float, int] | None = None  # when, and tokens by then
        self._samples: list[int] = []
        self._lock = asyncio.Lock()

    async def feed_part(self, last: str) -> FeedPart | None:
        """As FeedSource says."""
        for _ in range(2):
            await self._look()
            if (part := self._table.since(last)) is not None:
                return part
            await asyncio.sleep(PERIOD)
        return None

    async def _look(self) -> None:
        async with self._lock:  # one look for all who listen
            now = time.monotonic()
            if now - self._looked < PERIOD:
                return
            self._looked = now
            status = await self._engine.status()
            phase = self._engine.not_ready() or "serving"
            version = status.get("placement_version")
            self._table.put("cluster", self._head | {"controller": {"phase": phase}, "placement_version": version})
            self._table.replace("worker/", {worker["id"]: worker for worker in status["workers"]})
            self._sample(status["workers"], now)

    def _sample(self, workers: list[JSON], now: float) -> None:
        tokens = sum(worker.get("tokens", 0) for worker in workers)
        before, self._before = self._before, (now, tokens)
        if before is None:
            return
        blocks = sum(worker.get("kv_blocks", 0) for worker in workers)
        number = self._samples[-1] + 1 if self._samples else 1
        sample = {
            "n": number,
            "time": round(time.time(), 2),
            "tokens_per_second": round(max(0, tokens - before[1]) / (now - before[0]), 1),
            "running": sum(worker.get("running", 0) for worker in workers),
            "waiting": sum(worker.get("waiting", 0) for worker in workers),
            "kv_used": round(sum(worker.get("kv_blocks_used", 0) for worker in workers) / max(1, blocks), 4),
        }
        self._table.put(f"sample/{number}", sample)
        self._samples.append(number)
        if len(self._samples) > HISTORY:
            self._table.drop(f"sample/{self._samples.pop(0)}")


class Events:
    """The route. `ends`: whether this server is about to end, so that streams end too and are taken up elsewhere. One
    whose key is revoked ends as well: whoever takes it up again is asked for a key that is in force."""

    def __init__(self, source: FeedSource, silence_s: float, ends: Callable[[], bool] = lambda: False) -> None:
        self._source, self._silence_s, self._ends = source, silence_s, ends
        self._open = 0

    def route(self) -> Route:
        return Route(PATH, self.events)

    async def events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._open >= MAX_STREAMS:
            raise ReplyError(
                f"{self._open} event streams are open, and that many may be; close one, or try again in 5 s",
                status=429,
                kind="overloaded_error",
                code="overloaded",
                headers={"retry-after": "5"},
            )
        self._open += 1
        try:
            parts = self._events(request.headers.get("last-event-id", "")[:100], may_still_of(request))
            stream = EventStream(parts, _error_event, self._silence_s, COMMENT)
            stream.on_close(self._left)
            await stream.first_event(request.receive, FIRST_SECONDS)
        except WorkerGoneError as error:
            raise unavailable(str(error)) from None
        except StopAsyncIteration:
            raise unavailable("this server is about to end") from None
        return stream

    def _left(self) -> None:
        self._open -= 1

    async def _events(self, last: str, may_still: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
        def ends() -> bool:
            return self._ends() or not may_still()

        while not ends():
            asked = asyncio.ensure_future(self._source.feed_part(last))
            try:
                while not asked.done() and not ends():
                    await asyncio.wait({asked}, timeout=LOOK_SECONDS)
                part = asked.result() if asked.done() else None
            finally:
                asked.cancel()
            if part is not None and may_still():
                last = part.id
                yield b"id: " + last.encode() + b"\n" + sse(part.as_dict(), part.event)


def _error_event(error: Exception) -> bytes:
    said = unavailable(str(error)) if isinstance(error, WorkerGoneError) else internal_error()
    return sse(error_body(PATH, said), "error")
