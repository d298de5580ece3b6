"""Where the time of a request for tokens went, as its ingress replica sees it: a few looks at the clock for each
request, none for a token."""

from __future__ import annotations

import time
from collections.abc import Callable

from isotherm.cluster.jsontypes import JSON

HEADER = "x-isotherm-timing"


class Stopwatch:
    """Made when a request arrives. `prepare`: its body was read and made into tokens. `queue`: it waited at its
    attention shard. `prefill`: from then to its first token, the ways to and from the shard included. `decode`: from
    its first token to its last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrived = self._submitted = self._first = clock()
        self._queued = 0.0
        self.has_submitted = self.has_first = False

    def submitted(self) -> None:
        self.has_submitted = True
        self._submitted = self._first = self._clock()

    def first(self, queued: float) -> None:
        """The first token is here; its request had waited for so many seconds before it was begun."""
        self.has_first = True
        self._first, self._queued = self._clock(), queued

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self._arrived

    def phases(self) -> dict[str, float]:
        """Seconds of each phase up to now, and of all."""
        now = self._clock()
        until_first = self._first - self._submitted
        queued = min(self._queued, until_first)
        return {
            "prepare": self._submitted - self._arrived,
            "queue": queued,
            "prefill": until_first - queued,
            "decode": now - self._first,
            "total": now - self._arrived,
        }

    def header(self) -> dict[str, str]:
        """The phases in the form of Server-Timing, in milliseconds."""
        return {HEADER: ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in self.phases().items())}

    def as_json(self) -> JSON:
        return {f"{name}_ms": round(1000 * seconds, 3) for name, seconds in self.phases().items()}
