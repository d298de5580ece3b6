"""Who may have one more place: as many requests as there may be, as many tokens as fit, and no key with so many that
there are none for others. Pure; the front door and each shard's scheduler go by it."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.messages.requests import GenerationRequest

_RESERVE = 8  # one place of so many is kept for keys that have less than their share


class QueueFullError(IsothermError, ValueError):
    """There are as many requests as there may be; a later try may be taken."""


class Band(IntEnum):
    """Classes of priority, as far as places go. Requests find the places taken that those of their own band and of
    better ones have: background work keeps nobody out."""

    URGENT = 0
    NORMAL = 1
    BACKGROUND = 2


BACKGROUND = 1  # the least priority of background work


def band_of(priority: int) -> Band:
    return Band.BACKGROUND if priority >= BACKGROUND else Band.URGENT if priority < 0 else Band.NORMAL


@dataclass(frozen=True)
class Room:
    """What may be open at once, running and waiting, in each band."""

    requests: int
    tokens: int = sys.maxsize  # of prompts, and of outputs as long as they are expected to be

    def of(self, claim: Claim) -> Room:
        """What requests with one key may have of it while nobody else asks."""
        if not claim.key:
            return self
        return Room(self.requests - self.requests // _RESERVE, self.tokens - self.tokens // _RESERVE)


@dataclass(frozen=True)
class Claim:
    """Whose request it is. Requests without a key share the places as they come."""

    key: str = ""
    weight: float = 1.0
    band: Band = Band.NORMAL


@dataclass
class _Share:
    weight: float
    requests: int = 0
    tokens: int = 0


class Places:
    """Those that are taken."""

    def __init__(self) -> None:
        self._taken = [_Share(0.0) for _ in Band]
        self._by_key: list[dict[str, _Share]] = [{} for _ in Band]

    @property
    def requests(self) -> int:
        return sum(band.requests for band in self._taken)

    def seen_by(self, band: Band) -> int:
        """Requests that one of this band finds open."""
        return sum(taken.requests for taken in self._taken[: band + 1])

    def refusal(self, claim: Claim, count: int, room: Room) -> str | None:
        """None where so many more requests may come in; else why not. Tokens are looked at before they are added: while
        there is room for one the next request may come, however long it is."""
        requests = self.seen_by(claim.band)
        tokens = sum(taken.tokens for taken in self._taken[: claim.band + 1])
        if requests + count > room.requests:
            return f"{requests} requests are running or waiting, and {room.requests} may"
        if tokens >= room.tokens:
            return f"the requests that are running or waiting have {tokens} tokens, and {room.tokens} fit"
        if not claim.key:
            return None
        most = room.of(claim)
        if requests + count <= most.requests and tokens < most.tokens:
            return None
        mine, part = self._share(claim)
        if mine.requests + count <= max(1, most.requests * part) and mine.tokens < most.tokens * part:
            return None
        return (
            f"{mine.requests} requests of this key are running or waiting, and its share of the "
            f"{room.requests} places is {max(1, math.floor(most.requests * part))} while others ask too"
        )

    def _share(self, claim: Claim) -> tuple[_Share, float]:
        """What a key has, and its part of all that those have by weight who have anything."""
        mine = _Share(claim.weight)
        weights = {}
        for keys in self._by_key[: claim.band + 1]:
            for key, share in keys.items():
                weights[key] = share.weight
            if (found := keys.get(claim.key)) is not None:
                mine.requests += found.requests
                mine.tokens += found.tokens
        weights[claim.key] = claim.weight
        return mine, claim.weight / sum(weights.values())

    def take(self, claim: Claim, requests: int, tokens: int = 0) -> None:
        share = self._by_key[claim.band].setdefault(claim.key, _Share(claim.weight))
        share.weight = claim.weight
        for one in (share, self._taken[claim.band]):
            one.requests += requests
            one.tokens += tokens

    def give_back(self, claim: Claim, requests: int, tokens: int = 0) -> None:
        self.take(claim, -requests, -tokens)
        if self._by_key[claim.band][claim.key].requests <= 0:
            del self._by_key[claim.band][claim.key]


class OutputLengths:
    """How long an output is expected to be: clients seldom use all that they allow."""

    _LAST = 32  # outputs that make up most of the mean

    def __init__(self) -> None:
        self._mean: float | None = None

    def ended(self, tokens: int) -> None:
        self._mean = tokens if self._mean is None else self._mean + (tokens - self._mean) / self._LAST

    def expected(self, most: int) -> int:
        """Of an output that may have so many tokens: twice the mean, to be sure."""
        return most if self._mean is None else min(most, math.ceil(2 * self._mean))


def claim_of(request: GenerationRequest) -> Claim:
    return Claim(request.key, request.weight, band_of(request.priority))


class ShardPlaces:
    """Those of one shard, by which it keeps its bound also where several ingress replicas let requests in."""

    def __init__(self, room: Room) -> None:
        self.lengths = OutputLengths()
        self._room, self._places = room, Places()
        self._families: Counter[str] = Counter()
        self._in_background = self._others = 0  # requests

    @property
    def has_background_and_others(self) -> bool:
        return self._in_background > 0 and self._others > 0

    def enter(self, request: GenerationRequest) -> int:
        """Take a place → the tokens that it counts for. Raises QueueFullError. A request that a shard had before, and
        one whose family is here, always has one."""
        claim, related = claim_of(request), bool(request.family and self._families[request.family])
        if not (request.accepted or request.generated or related):
            refusal = self._places.refusal(claim, 1, self._room)
            if refusal is not None:
                raise QueueFullError(f"at this shard {refusal}")
        tokens = (0 if related else len(request.prompt)) + self.lengths.expected(request.params.max_tokens)
        self._places.take(claim, 1, tokens)
        self._count(request, 1)
        return tokens

    def leave(self, request: GenerationRequest, tokens: int) -> None:
        self._places.give_back(claim_of(request), 1, tokens)
        self._count(request, -1)

    def _count(self, request: GenerationRequest, change: int) -> None:
        if request.priority >= BACKGROUND:
            self._in_background += change
        else:
            self._others += change
        if request.family:
            self._families[request.family] += change
            if not self._families[request.family]:
                del self._families[request.family]
