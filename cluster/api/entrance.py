"""The places of the requests for tokens that are open at this ingress replica: taken before a body costs anything, made
exact when it is known what the body asks for, given back when the last token is out."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from isotherm.cluster.api.admission import Admission
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.gate import CAPACITY_HEADER, Told, overloaded
from isotherm.cluster.engine.places import Claim, OutputLengths, Room, band_of
from isotherm.cluster.messages.requests import GenerationRequest


class Entrance:
    """`lengths` is told the length of each output."""

    def __init__(self, engine: EngineClient) -> None:
        self.lengths = OutputLengths()
        self.admission = Admission(random.random)
        self._engine = engine

    @property
    def room(self) -> Room:
        return Room(self._engine.capacity(), self._engine.token_capacity())

    def enter(self, claim: Claim) -> Visit:
        """One place, for a request of which nothing else is known. Raises ReplyError 429."""
        visit = Visit(self, claim)
        visit.take(1)
        return visit

    def overloaded(self, reason: str) -> ReplyError:
        return overloaded(reason, self.admission.retry_after(time.monotonic()))


class Visit:
    """The places of one HTTP request. `leave` gives them back, once."""

    def __init__(self, entrance: Entrance, claim: Claim) -> None:
        self._entrance, self._first, self._claim = entrance, claim, claim
        self._count = self._tokens = 0

    def take(self, count: int) -> None:
        """Raises ReplyError 429."""
        entrance = self._entrance
        if count and (refusal := entrance.admission.enter(self._claim, count, entrance.room, time.monotonic())):
            raise entrance.overloaded(refusal)
        self._count += count

    def settle(self, requests: Sequence[GenerationRequest]) -> None:
        """A place for each of the engine's requests, in the band that they are of. Raises ReplyError: 400 where there
        are more than there may ever be, else 429."""
        entrance, room = self._entrance, self._entrance.room.of(self._claim)
        if (count := len(requests)) > room.requests:
            message = f"n: {count} choices are more than the {room.requests} that this server takes at once"
            raise ReplyError(message, param="n")
        claim = Claim(self._claim.key, self._claim.weight, band_of(requests[0].priority))
        if claim.band != self._claim.band:
            entrance.admission.move(self._claim, claim, self._count)
            self._claim = claim
        self.take(count - self._count)
        prompts = {request.family or request.id: len(request.prompt) for request in requests}  # a family has one
        outputs = sum(entrance.lengths.expected(request.params.max_tokens) for request in requests)
        self._tokens = sum(prompts.values()) + outputs
        entrance.admission.expect(claim, self._tokens)

    def leave(self) -> None:
        count, tokens, self._count, self._tokens = self._count, self._tokens, 0, 0
        if count:
            self._entrance.admission.leave(self._claim, count, time.monotonic(), tokens)

    def header(self) -> dict[str, str]:
        """What the proxy is told, so that it refuses what this replica would."""
        first, capacity = self._first, self._entrance.room.requests
        told = Told(capacity, self._claim.band, first.band, first.weight, bool(first.key))
        return {CAPACITY_HEADER.decode(): told.as_text()}
