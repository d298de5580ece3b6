"""GET /admin/events: what happens in the cluster, as a stream of server-sent events that can be taken up again. Knows
nothing about what is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.access.middleware import may_still_of
from isotherm.cluster.api.error_forms import error_body
from isotherm.cluster.api.errors import ReplyError, internal_error, unavailable
from isotherm.cluster.api.replies import COMMENT, sse
from isotherm.cluster.api.stream import EventStream
from isotherm.cluster.messages.feed import FeedPart
from isotherm.cluster.messages.membership import WorkerGoneError

MAX_STREAMS = 64  # of one process
FIRST_SECONDS = 10.0  # in which the first part comes, or the stream begins without it
LOOK_SECONDS = 0.5  # from one look whether this server ends to the next
PATH = "/admin/events"


class FeedSource(Protocol):
    """Where the parts come from."""

    async def feed_part(self, last: str) -> FeedPart | None:
        """What is new since the part whose id is `last`; waits a while for it, and gives None where nothing comes.
        Raises WorkerGoneError where what is told cannot be known now."""


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
