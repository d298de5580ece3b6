"""The front door's bound as Serve's proxy keeps it: what the ingress replicas would refuse does not even reach them.

On its way to a replica a request waits behind all that the event loops have to do, for seconds in a burst. Here it is
refused at once, for a tenth of the cost, so that refusals leave the machine to those who were let in."""

from __future__ import annotations

import asyncio
import random
import sys
import time

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.admission import Admission
from isotherm.cluster.api.error_forms import error_body
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.replies import to_json

CAPACITY_HEADER = b"x-isotherm-capacity"  # of the replicas' responses, taken out by the proxy


def overloaded(reason: str, retry_after: int) -> ReplyError:
    headers = {"retry-after": str(retry_after)}
    message = f"{reason}; try again in {retry_after} s"
    return ReplyError(message, status=429, kind="overloaded_error", code="overloaded", headers=headers)


class GateMiddleware:
    """In Serve's proxy. Lets in as many requests as the last response that told its replica's capacity says; any number
    before there was one. Several proxies let in as many each, so replicas and shards keep the bound too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._admission = Admission(random.random)
        self._capacity = sys.maxsize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = False

        def leave() -> None:
            nonlocal inside
            if inside:
                inside = False
                self._admission.leave(1, time.monotonic())

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._learn(message.get("headers", ()))}
            elif not message.get("more_body", False):
                leave()  # before the client knows that it may ask again
            await send(message)

        if scope["type"] != "http" or scope["method"] != "POST" or "/v1/" not in scope["path"]:
            await self.app(scope, receive, send_on)
        elif self._admission.enter(1, self._capacity, time.monotonic()):
            inside = True
            try:
                await self.app(scope, receive, send_on)
            finally:
                leave()
        else:
            now = time.monotonic()
            reason = f"{self._admission.open} requests are running or waiting, and {self._capacity} may"
            error = overloaded(reason, self._admission.retry_after(now))
            # Who comes again at once, whatever he is told, waits here for it, which costs nothing.
            await asyncio.sleep(self._admission.refusal_delay(now))
            body = to_json(error_body(scope["path"], error))
            await Response(body, error.status, error.headers, "application/json")(scope, receive, send)

    def _learn(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        others = []
        for name, value in headers:
            if name.lower() == CAPACITY_HEADER:
                self._capacity = int(value)
            else:
                others.append((name, value))
        return others
