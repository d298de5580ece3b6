"""Whether requests get on at an ingress replica, told to Serve's proxy with every piece of a reply: in a burst a
question of the proxy's would wait for seconds behind the work of the replica's event loop, and these pieces flow then
anyway."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.engine_client import EngineClient

# A key of ASGI messages from replica to proxy: (the replica's name, seconds since requests were seen to get on).
KEY = "isotherm.onward"
PERIOD = 0.2  # seconds between two looks, while there are requests


class Onward:
    """Looks whether requests get on, as long as there are some. `clock` gives seconds."""

    def __init__(self, name: str, engine: EngineClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._engine, self._clock = name, engine, clock
        self._seen = -math.inf  # when the last look began that found them to get on
        self._open = 0
        self._some = asyncio.Event()  # there are requests

    def begin(self) -> None:
        self._open += 1
        self._some.set()

    def end(self) -> None:
        self._open -= 1
        if not self._open:
            self._some.clear()

    def told(self) -> tuple[str, float]:
        return self._name, self._clock() - self._seen

    async def keep_looking(self) -> None:
        while True:
            await self._some.wait()
            begin = self._clock()
            if self._engine.not_ready() is None and await self._engine.held_up() is None:
                self._seen = begin
            await asyncio.sleep(PERIOD)


class OnwardMiddleware:
    """Around the application of a replica behind Serve's proxy."""

    def __init__(self, app: ASGIApp, onward: Onward) -> None:
        self.app, self._onward = app, onward

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        onward = self._onward

        async def send_told(message: Message) -> None:
            message[KEY] = onward.told()
            await send(message)

        onward.begin()
        try:
            await self.app(scope, receive, send_told)
        finally:
            onward.end()
