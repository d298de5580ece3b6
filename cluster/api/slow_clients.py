"""Clients that are slower than is of any use: they are taken to have gone away, so that what was made for them is not
kept for ever, nor their places."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.error_forms import id_headers, send_error
from isotherm.cluster.api.errors import ReplyError

log = logging.getLogger(__name__)
STALL_SECONDS = 30.0  # in which a client must take what was sent, and send the next part of its body


class SlowClientMiddleware:
    """Where the server's own buffer is full, sending waits for the client. One that has not made room for the next
    message after `seconds` is told of as disconnected, to whoever listens for that, and nothing more is sent to it; so
    is one of whose body no part has come for as long, which is answered 408 before. Stands where clients' connections
    are: in Serve's proxy, or around the application where there is none. The request's id is the one in its header
    where that was made sure of outside, else the one that the application has given it."""

    def __init__(self, app: ASGIApp, seconds: float = STALL_SECONDS) -> None:
        self.app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = _Client(scope, receive, send, self._seconds)
        try:
            await self.app(scope, client.receive, client.send)
        finally:
            client.close()


class _Client:
    """The client of one request, as the application sees it. It costs one timer, which is looked at when it goes off: a
    timer for each message would cost more than the message."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
        self._scope, self._receive, self._send, self._seconds = scope, receive, send, seconds
        self._loop = asyncio.get_running_loop()
        self._waits: set[_Wait] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._has_body = self._has_answer = self._is_gone = False

    async def receive(self) -> Message:
        """The next message; that the client has gone, as soon as it counts as gone."""
        message: Message = {"type": "http.disconnect"}
        if not self._is_gone:
            with _Wait(self, None if self._has_body else "has sent nothing of its body") as wait:
                message = await self._receive()
            if wait.is_over and not (self._has_body or self._has_answer):
                await self._answer_stalled()
        self._has_body = self._has_body or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if not self._is_gone:
            self._has_answer = True
            with _Wait(self, "has taken nothing of its answer"):
                await self._send(message)

    async def _answer_stalled(self) -> None:
        """One who is still there learns why the connection ends."""
        scope = self._scope
        message = f"nothing has come of the request's body for {self._seconds:g} s; send it again, whole"
        headers = {**id_headers(scope), "connection": "close"}
        error = ReplyError(message, status=408, kind="timeout_error", code="body_timeout", headers=headers)
        with _Wait(self, "has taken nothing of its answer"):
            await send_error(scope["path"], error, self._send)

    def close(self) -> None:
        """The request is over."""
        if self._timer is not None:
            self._timer.cancel()

    def begin(self, wait: _Wait) -> float:
        """A wait begins → when."""
        now = self._loop.time()
        self._waits.add(wait)
        if self._timer is None and wait.doing is not None:
            self._timer = self._loop.call_at(now + self._seconds, self._look)
        return now

    def end(self, wait: _Wait) -> None:
        self._waits.discard(wait)

    def _look(self) -> None:
        """A client that is in time has its timer put off to where the wait that is on then is too long; where none is
        on, the next one sets it."""
        self._timer = None
        begun = [(wait.since, wait.doing) for wait in self._waits if wait.doing is not None]
        if not begun:
            return
        since, doing = min(begun)
        if self._loop.time() < since + self._seconds:
            self._timer = self._loop.call_at(since + self._seconds, self._look)
            return
        log.warning("a client %s for %g s; its request to %r ends", doing, self._seconds, self._scope["path"][:200])
        self._is_gone = True
        for wait in self._waits:
            wait.give_up()


class _Wait:
    """The block below it waits for a client: it ends without an error where that is given up. `doing`: what the client
    does if that takes too long; None: it may take as long as it likes."""

    __slots__ = ("_client", "_task", "doing", "is_over", "since")

    def __init__(self, client: _Client, doing: str | None) -> None:
        self._client, self.doing = client, doing
        self.is_over = False

    def __enter__(self) -> _Wait:
        task: Any = asyncio.current_task()
        self._task = task
        self.since = self._client.begin(self)
        return self

    def give_up(self) -> None:
        self.is_over = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._client.end(self)
        # Python counts, from 3.11 on, how often a task was cancelled: it may have been by somebody else too.
        besides = self.is_over and hasattr(self._task, "uncancel") and self._task.uncancel() > 0
        return kind is asyncio.CancelledError and self.is_over and not besides
