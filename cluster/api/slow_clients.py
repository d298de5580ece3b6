"""Clients that are slower than is of any use: they are taken to have gone away, so that what was made for them is not
kept for ever, nor their places."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
STALL_SECONDS = 30.0  # in which a client must take what was sent, and send the next part of its body


class SlowClientMiddleware:
    """Where the server's own buffer is full, sending waits for the client. One that has not made room for the next
    message after `seconds` is told of as disconnected, to whoever listens for that, and nothing more is sent to it; so
    is one of whose body no part has come for as long. Stands where clients' connections are: in Serve's proxy, or
    around the application where there is none."""

    def __init__(self, app: ASGIApp, seconds: float = STALL_SECONDS) -> None:
        self.app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = asyncio.Event()
        has_body = False

        def give_up(doing: str) -> None:
            if not gone.is_set():
                log.warning("a client %s for %g s; its request to %s ends", doing, self._seconds, scope["path"][:200])
            gone.set()

        async def receive_in_time() -> Message:
            nonlocal has_body
            if has_body:
                return await _first(receive, gone)
            with _Stall(self._seconds) as stall:
                message = await receive()
            if stall.is_over:
                give_up("has sent nothing of its body")
                return {"type": "http.disconnect"}
            has_body = not message.get("more_body", False)
            return message

        async def send_in_time(message: Message) -> None:
            if not gone.is_set():
                with _Stall(self._seconds) as stall:
                    await send(message)
                if stall.is_over:
                    give_up("has taken nothing of its answer")

        await self.app(scope, receive_in_time, send_in_time)


async def _first(receive: Receive, gone: asyncio.Event) -> Message:
    """The next message; that the client has gone, as soon as it counts as gone."""
    receiving, waiting = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({receiving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"} if waiting.done() else receiving.result()
    finally:
        receiving.cancel()
        waiting.cancel()


class _Stall:
    """Ends the block below it after a time, without an error; `is_over` says that it has done so. It costs a timer: a
    task for each message, as asyncio.wait_for would have, is too much."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.is_over = False

    def __enter__(self) -> _Stall:
        task: Any = asyncio.current_task()
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        return self

    def _end(self) -> None:
        self.is_over = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._timer.cancel()
        # Python counts, from 3.11 on, how often a task was cancelled: it may have been by somebody else too.
        besides = self.is_over and hasattr(self._task, "uncancel") and self._task.uncancel() > 0
        return kind is asyncio.CancelledError and self.is_over and not besides
