"""Deltas on their way from the step loop to the ingress replicas: who gets what, and when. Pure but for the clock that
it is given."""

from __future__ import annotations

from collections.abc import Sequence

from isotherm.cluster.messages.requests import Delta, merged_deltas

FLUSH = 0.01  # seconds between two lists of deltas to one ingress replica, at least
LONGEST_FLUSH = (
    0.04  # seconds between two of them where many streams share the machine; a reader sees text flow all the same
)
FEW_STREAMS = 4  # up to so many, nothing waits longer than FLUSH


def flush_interval(streams: int) -> float:
    """Seconds between two lists that bring tokens of so many streams. A chunk costs the front door about the same
    however many tokens are in it, so with more streams they come less often, with more tokens in each."""
    return min(LONGEST_FLUSH, FLUSH * max(1.0, streams / FEW_STREAMS))


class Outbox:
    """What one ingress replica has not been sent yet. First tokens, and all that ends a stream, wait for no more than
    FLUSH."""

    def __init__(self) -> None:
        self._waiting: list[Delta] = []
        self._urgent = False
        self._sent = float("-inf")

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, deltas: Sequence[Delta]) -> None:
        self._waiting += deltas
        self._urgent = self._urgent or any(delta.start == 0 or delta.finish_reason is not None for delta in deltas)

    def due(self, now: float) -> list[Delta]:
        """What is to be sent at `now` (seconds), joined; empty where there is nothing, or where it can wait."""
        if not self._waiting:
            return []
        least = FLUSH if self._urgent else flush_interval(len({delta.request_id for delta in self._waiting}))
        if now < self._sent + least - FLUSH / 10:  # timers may be a little early
            return []
        deltas, self._waiting, self._urgent, self._sent = merged_deltas(self._waiting), [], False, now
        return deltas
