"""/health and /ready as Serve's proxy answers them: from what the ingress replicas have said just now, so that neither
waits behind their work.

In a burst a replica's event loop has hundreds of streams to serve, and a request takes seconds to get through it,
though all is well."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.background import Background

PATHS = ("/health", "/ready")
ALIVE_SECONDS = 2.0  # a replica that sent something within so long is alive
READY_SECONDS = 15.0  # a replica that is alive is as ready as it said within so long
QUICK_SECONDS = 0.5  # an answer that comes within so long is waited for in any case
ASK_SECONDS = 5.0  # without an answer and a sign of life for so long, no replica answers


@dataclass(frozen=True)
class Answer:
    """What a replica said, and when."""

    start: Message
    body: bytes
    at: float

    @property
    def good(self) -> bool:
        return bool(self.start["status"] == 200)


class SignsOfLife:
    """What is known of the ingress replicas behind one proxy. Pure but for the clock that it is given."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._heard = -math.inf  # when a replica last sent a part of a good reply
        self._answers: dict[str, Answer] = {}

    def heard(self) -> None:
        self._heard = self._clock()

    def answered(self, path: str, answer: Answer) -> None:
        self._answers[path] = answer
        if answer.good:
            self._heard = max(self._heard, answer.at)

    def known(self, path: str) -> Answer | None:
        """The last answer, where it still holds: a good one as long as the replicas are alive, for /ready not too long;
        a bad one never."""
        now, last = self._clock(), self._answers.get(path)
        if last is None or not last.good or now - self._heard > ALIVE_SECONDS:
            return None
        return last if path == "/health" or now - last.at <= READY_SECONDS else None


class HealthMiddleware:
    """In Serve's proxy. Asks a replica, one request for all who want to know, and gives its answer; where that takes a
    while, the last one that still holds; where there is none, after a few seconds, 503."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._signs = SignsOfLife(time.monotonic)
        self._asking: dict[str, asyncio.Task[Answer]] = {}
        self._background = Background()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] in PATHS and scope["method"] in ("GET", "HEAD"):
            await self._tell(scope, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        good = False

        async def send_heard(message: Message) -> None:
            nonlocal good
            if message["type"] == "http.response.start":
                good = message["status"] == 200
            if good:
                self._signs.heard()
            await send(message)

        await self.app(scope, receive, send_heard)

    async def _tell(self, scope: Scope, send: Send) -> None:
        path = scope["path"]
        answer = self._signs.known(path) if path == "/health" else None
        asking = self._ask(scope) if answer is None else None
        for seconds in (QUICK_SECONDS, ASK_SECONDS - QUICK_SECONDS):
            if asking is not None and answer is None:
                done, _ = await asyncio.wait({asking}, timeout=seconds)
                answer = asking.result() if done and asking.exception() is None else self._signs.known(path)
        start, body = (answer.start, answer.body) if answer is not None else _unanswered(ASK_SECONDS)
        await send(start)
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _ask(self, scope: Scope) -> asyncio.Task[Answer]:
        """The question that is under way, or a new one. It goes on when those who wait for it have given up."""
        path = scope["path"]
        if path not in self._asking:
            self._asking[path] = self._background.spawn(
                f"asking a replica for {path}", self._question({**scope, "method": "GET"})
            )
            self._asking[path].add_done_callback(lambda _: self._asking.pop(path))
        return self._asking[path]

    async def _question(self, scope: Scope) -> Answer:
        start, body, asked = _unanswered(0)[0], b"", False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # this client does not go away
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
            else:
                body += message.get("body", b"")

        await self.app(scope, receive, send)
        answer = Answer(start, body, time.monotonic())
        self._signs.answered(scope["path"], answer)
        return answer


def _unanswered(seconds: float) -> tuple[Message, bytes]:
    body = b'{"status":"unknown","reason":"no ingress replica has answered for %g s"}' % seconds
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"retry-after", b"1")]
    return {"type": "http.response.start", "status": 503, "headers": headers}, body
