"""Replies that take their time: server-sent event streams that are never silent for long, and clients that go away
meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_T = TypeVar("_T")


class EventStream(Response):
    """A server-sent event stream. `waiting` is sent whenever nothing else was for `silence_s` seconds. Watches for the
    client's going away while it sends, and closes the events whatever happens. An error is an event of its own, made by
    `error_event`, after which nothing comes."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        error_event: Callable[[Exception], bytes],
        silence_s: float,
        waiting: bytes,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._first = asyncio.ensure_future(_next(events))
        self._error_event = error_event
        self._silence_s = silence_s
        self._waiting = waiting
        self._sent_at = 0.0
        self._on_close: Callable[[], None] = lambda: None
        self.init_headers(STREAM_HEADERS)
        del self.headers["content-length"]

    async def first_event(self, receive: Receive, seconds: float) -> None:
        """Wait for the first event, at most so long: an error that comes before it is raised here, and can still be an
        HTTP status. Where it is raised, and where the client goes away, the events are closed."""
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({self._first, watcher}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._first.done():
                self._first.result()
            elif watcher.done():
                raise ClientDisconnect
        except BaseException:
            await self.aclose()
            raise
        finally:
            await cancelled(watcher)

    def on_close(self, callback: Callable[[], None]) -> None:
        """To be called once, when the last event was sent or the events are closed; before the client can know."""
        self._on_close = callback

    async def aclose(self) -> None:
        try:
            await cancelled(self._first)
            await self._events.aclose()
        finally:
            self._close()

    def _close(self) -> None:
        callback, self._on_close = self._on_close, lambda: None
        callback()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except (ClientDisconnect, OSError):
            logger.info("request %s: the client went away in mid-stream", scope.get("state", {}).get("request_id"))
        finally:
            await self.aclose()

    async def _send(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        comments = asyncio.ensure_future(self._comment(send))
        try:
            await send({"type": "http.response.body", "body": await self._first, "more_body": True})
            self._sent_at = clock()
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._sent_at = clock()
        except StopAsyncIteration:
            pass  # there was no event at all
        except Exception as error:
            await send({"type": "http.response.body", "body": self._error_event(error), "more_body": True})
        finally:
            await cancelled(comments)
        self._close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._sent_at = clock()
        while True:
            await asyncio.sleep(self._sent_at + self._silence_s - clock())
            if clock() - self._sent_at >= self._silence_s:
                await send({"type": "http.response.body", "body": self._waiting, "more_body": True})
                self._sent_at = clock()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result. Raises ClientDisconnect, with the work cancelled and cleaned up, when the client goes away
    first. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await cancelled(task, watcher)


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancels the tasks and returns when they have cleaned up. What they raise is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await events.__anext__()
