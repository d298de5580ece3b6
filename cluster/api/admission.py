"""Which requests the front door lets in, decided before they cost anything, and when one that was refused should come
again. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

from isotherm.cluster.engine.places import Claim, Places, Room

LONGEST_RETRY = 60  # seconds
_REFUSALS = 200  # a second, at most, until each has waited for _LONGEST_DELAY
_LONGEST_DELAY = 1.0  # seconds
_MEMORY = 10.0  # seconds after which a departure counts 1/e


class Admission:
    """Counts the requests for the engine that are open at one ingress replica, one for each choice of a reply."""

    def __init__(self, random: Callable[[], float]):
        """`random` gives numbers from 0 to 1: those who were refused together shall not come back together."""
        self._places = Places()
        self._random = random
        self._next_refusal = 0.0
        self._at = 0.0  # the time of the two below
        self._left = 0.0  # departures, decayed
        self._busy = 0.0  # seconds in which requests were open, decayed alike

    @property
    def open(self) -> int:
        return self._places.requests

    def enter(self, claim: Claim, count: int, room: Room, now: float) -> str | None:
        """Let so many in, all or none: None, or why there is no room for them."""
        refusal = self._places.refusal(claim, count, room)
        if refusal is None:
            self._advance(now)
            self._places.take(claim, count)
        return refusal

    def leave(self, claim: Claim, count: int, now: float, tokens: int = 0) -> None:
        self._advance(now)
        self._places.give_back(claim, count, tokens)
        self._left += count

    def move(self, old: Claim, new: Claim, count: int) -> None:
        """Those that are let in turn out to be of another band."""
        self._places.give_back(old, count)
        self._places.take(new, count)

    def expect(self, claim: Claim, tokens: int) -> None:
        """Requests that are let in have so many, their outputs as long as they are expected to be."""
        self._places.take(claim, 0, tokens)

    def retry_after(self, now: float) -> int:
        """Whole seconds: a quarter to a half of the time that a request spends here now, which is what those that are
        open take to leave. There is room again then, and the queue is not yet empty."""
        self._advance(now)
        # Before the first has left nothing is known, but for how long they have all been here.
        stay = 2 * self._busy if self._left < 0.5 else self.open * self._busy / self._left
        return math.ceil(min(max(1.0, stay * (0.25 + 0.25 * self._random())), LONGEST_RETRY))

    def refusal_delay(self, now: float) -> float:
        """Seconds to hold a refusal back, so that those who do not wait before they come again cannot keep the machine
        busy with it."""
        self._next_refusal = max(now, self._next_refusal + 1 / _REFUSALS)
        return min(self._next_refusal - now, _LONGEST_DELAY)

    def _advance(self, now: float) -> None:
        kept = math.exp((self._at - now) / _MEMORY)
        self._left *= kept
        self._busy = self._busy * kept + (_MEMORY * (1 - kept) if self.open else 0.0)
        self._at = now
