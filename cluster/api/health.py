"""/health and /ready as Serve's proxy answers them, so that neither waits behind the work of the ingress replicas: in a
burst a replica's event loop has hundreds of streams to serve, and a request takes seconds to get through it, though all
is well.

/health is known from what the replicas have said just now. /ready is asked anew each time, and where the question waits
in a replica, what that replica says meanwhile of its requests is the answer (cluster/api/onward.py)."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.onward import KEY
from isotherm.cluster.background import Background

HEALTH, READY = "/health", "/ready"
ALIVE_SECONDS = 2.0  # a replica that sent something within so long is alive
ONWARD_SECONDS = 0.7  # requests that were seen to get on within so long do so
QUICK_SECONDS = {HEALTH: 0.5, READY: 0.25}  # an answer that comes within so long is waited for in any case
ASK_SECONDS = {HEALTH: 5.0, READY: 2.5}  # without an answer and a sign of life for so long, no replica answers
LOOK = 0.05  # seconds between two looks whether there is a sign of life


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
        self._onward: dict[str, float] = {}  # replica with replies under way → when its requests were seen to get on
        self._under_way: Counter[str] = Counter()  # replies that have begun, by replica

    def heard(self) -> None:
        self._heard = self._clock()

    def told(self, replica: str, seconds: float) -> None:
        """It has seen its requests get on so many seconds ago."""
        self._onward[replica] = self._clock() - seconds

    def began(self, replica: str) -> None:
        self._under_way[replica] += 1

    def ended(self, replica: str) -> None:
        self._under_way[replica] -= 1
        if not self._under_way[replica]:
            del self._under_way[replica]
            self._onward.pop(replica, None)

    def answered(self, path: str, answer: Answer) -> None:
        self._answers[path] = answer
        if answer.good:
            self._heard = max(self._heard, answer.at)

    def known(self, path: str) -> Answer | None:
        """The last answer, where it still holds; a bad one never does. For /health as long as a replica is alive; for
        /ready as long as replies are under way, and every replica that has some sees its requests get on."""
        now, last = self._clock(), self._answers.get(path)
        if last is None or not last.good:
            return None
        if path == HEALTH:
            return last if now - self._heard <= ALIVE_SECONDS else None
        seen = [self._onward.get(replica, -math.inf) for replica in self._under_way]
        return last if seen and now - min(seen) <= ONWARD_SECONDS else None


class HealthMiddleware:
    """In Serve's proxy. Asks a replica, one request for all who want to know, and gives its answer; where that takes a
    while, what is known; where nothing is, after a few seconds, 503."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._signs = SignsOfLife(time.monotonic)
        self._asking: dict[str, asyncio.Task[Answer]] = {}
        self._background = Background()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] in QUICK_SECONDS and scope["method"] in ("GET", "HEAD"):
            await self._tell(scope, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        good, replica = False, ""

        async def send_heard(message: Message) -> None:
            nonlocal good, replica
            if message["type"] == "http.response.start":
                good = message["status"] == 200
            if good:
                self._signs.heard()
            if (told := message.pop(KEY, None)) is not None:
                self._signs.told(*told)
                if not replica:
                    replica = told[0]
                    self._signs.began(replica)
            await send(message)

        try:
            await self.app(scope, receive, send_heard)
        finally:
            if replica:
                self._signs.ended(replica)

    async def _tell(self, scope: Scope, send: Send) -> None:
        path, begin = scope["path"], time.monotonic()
        answer = self._signs.known(path) if path == HEALTH else None
        asking = None if answer is not None else self._ask(scope)
        while asking is not None and answer is None and (left := begin + ASK_SECONDS[path] - time.monotonic()) > 0:
            quick = begin + QUICK_SECONDS[path] - time.monotonic()
            done, _ = await asyncio.wait({asking}, timeout=min(left, max(quick, LOOK)))
            if not done:
                answer = self._signs.known(path)
            elif asking.cancelled() or asking.exception() is not None:
                break
            else:
                answer = asking.result()
        start, body = (answer.start, answer.body) if answer is not None else _unanswered(ASK_SECONDS[path])
        await send(start)
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _ask(self, scope: Scope) -> asyncio.Task[Answer]:
        """The question that is under way, or a new one. It goes on when those who wait for it have given up; one for
        /ready ends then, since another replica may answer the next."""
        path = scope["path"]
        if path not in self._asking:
            question = self._question({**scope, "method": "GET"})
            if path == READY:
                question = asyncio.wait_for(question, ASK_SECONDS[READY])
            self._asking[path] = self._background.spawn(f"asking a replica for {path}", question)
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
