"""The front door's bound as Serve's proxy keeps it: what the ingress replicas would refuse does not even reach them.

On its way to a replica a request waits behind all that the event loops have to do, for seconds in a burst. Here it is
refused at once, for a tenth of the cost, so that refusals leave the machine to those who were let in."""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.access.presented import presented
from isotherm.cluster.api.admission import Admission
from isotherm.cluster.api.error_forms import send_error
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.engine.places import Band, Claim, Room

CAPACITY_HEADER = b"x-isotherm-capacity"  # of the replicas' responses, taken out by the proxy
_MOST_KEYS = 4096  # that a proxy remembers, those that were used last
_STRANGERS = "?"  # whose key has not been answered yet: all of them together count as one


def overloaded(reason: str, retry_after: int) -> ReplyError:
    headers = {"retry-after": str(retry_after)}
    message = f"{reason}; try again in {retry_after} s"
    return ReplyError(message, status=429, kind="overloaded_error", code="overloaded", headers=headers)


@dataclass(frozen=True)
class Told:
    """What a replica tells the proxy beside its answer, as the text of a header. `capacity`: how many requests may be
    open. `band`: of which the answered one has turned out to be. `next_band`, `weight`: what the next one with its key
    may be taken for. `keyed`: whether the server has keys."""

    capacity: int
    band: Band
    next_band: Band
    weight: float
    keyed: bool

    def as_text(self) -> str:
        return f"{self.capacity} {self.band:d} {self.next_band:d} {self.weight:g} {self.keyed:d}"

    @classmethod
    def parse(cls, text: str) -> Told:
        """What `as_text` gave, here or in the version before, which wrote a word last or nothing."""
        capacity, band, next_band, weight, *keyed = text.split()
        return cls(int(capacity), Band(int(band)), Band(int(next_band)), float(weight), keyed in (["1"], ["keyed"]))


class GateMiddleware:
    """In Serve's proxy, for every POST below /v1/: what asks for tokens or counts them, files, and batches. All other
    requests go past it. Lets in as many as the last response that told its replica's capacity says; any number
    before there was one. Several proxies let in as many each, so replicas and shards keep the bound too.

    Who asks is known by what the key's header holds, of which only a digest is kept; its band and weight are those that
    the last answer to it told."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._admission = Admission(random.random)
        self._room = Room(sys.maxsize)
        self._has_keys = False
        self._known: OrderedDict[str, Claim] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or "/v1/" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        key = _digest(scope)
        visit = _Visit(self._admission, self._claim(key))
        if (refusal := visit.enter(self._room)) is None:
            await self._pass(scope, receive, send, key, visit)
        else:
            now = time.monotonic()
            error = overloaded(refusal, self._admission.retry_after(now))
            # Who comes again at once, whatever he is told, waits here for it, which costs nothing.
            await asyncio.sleep(self._admission.refusal_delay(now))
            await send_error(scope["path"], error, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, key: str, visit: _Visit) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._learn(message.get("headers", ()), key, visit)}
            elif not message.get("more_body", False):
                visit.leave()  # before the client knows that it may ask again
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        finally:
            visit.leave()

    def _claim(self, key: str) -> Claim:
        if not self._has_keys:
            return Claim()
        if (known := self._known.get(key)) is None:
            return Claim(_STRANGERS)
        self._known.move_to_end(key)
        return known

    def _learn(self, headers: list[tuple[bytes, bytes]], key: str, visit: _Visit) -> list[tuple[bytes, bytes]]:
        others = []
        for name, value in headers:
            if name.lower() != CAPACITY_HEADER:
                others.append((name, value))
                continue
            told = Told.parse(value.decode())
            self._room, self._has_keys = Room(told.capacity), told.keyed
            visit.has_band(told.band)
            if told.keyed:
                self._known[key] = Claim(key, told.weight, told.next_band)
                if len(self._known) > _MOST_KEYS:
                    self._known.popitem(last=False)
        return others


class _Visit:
    """The place of one request."""

    def __init__(self, admission: Admission, claim: Claim) -> None:
        self._admission, self._claim, self._inside = admission, claim, False

    def enter(self, room: Room) -> str | None:
        refusal = self._admission.enter(self._claim, 1, room, time.monotonic())
        self._inside = refusal is None
        return refusal

    def has_band(self, band: Band) -> None:
        if self._inside and band != self._claim.band:
            claim = Claim(self._claim.key, self._claim.weight, band)
            self._admission.move(self._claim, claim, 1)
            self._claim = claim

    def leave(self) -> None:
        if self._inside:
            self._inside = False
            self._admission.leave(self._claim, 1, time.monotonic())


def _digest(scope: Scope) -> str:
    held = presented(Headers(scope=scope)) or ""  # however it is sent, it is one key
    return hashlib.blake2b(held.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
