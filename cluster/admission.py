"""Which requests the front door lets in, decided before they cost anything, and when one that was refused should come again. Pure."""

from __future__ import annotations

from collections.abc import Callable

LONGEST_RETRY = 60  # seconds
_WEIGHT = 0.1  # of the newest interval in the mean of the intervals between two departures


class Admission:
    """Counts the requests for the engine that are open at one ingress replica, one for each choice of a reply."""

    def __init__(self, random: Callable[[], float]):
        """`random` gives numbers from 0 to 1: those who were refused together shall not come back together."""
        self.open = 0
        self._random = random
        self._interval: float | None = None  # mean seconds between two departures, while requests are open
        self._since = 0.0  # the last departure, or the arrival of the first request after there was none

    def enter(self, count: int, capacity: int, now: float) -> bool:
        """Let so many in, where not more than `capacity` are open then. All or none."""
        if self.open + count > capacity:
            return False
        if not self.open:
            self._since = now
        self.open += count
        return True

    def leave(self, count: int, now: float) -> None:
        self.open -= count
        interval = (now - self._since) / count
        self._interval = interval if self._interval is None else self._interval + _WEIGHT * (interval - self._interval)
        self._since = now

    def retry_after(self) -> int:
        """Whole seconds: a quarter to a half of the time that a request spends here now, which is what the open ones take to leave. There is room
        again then, and the queue is not yet empty."""
        stay = self.open * (self._interval or 0.0)
        return int(min(max(1.0, stay * (0.25 + 0.25 * self._random())), LONGEST_RETRY) + 0.5)
