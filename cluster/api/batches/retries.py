"""When batches whose running has failed are run again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from isotherm.cluster.background import pauses

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0  # seconds, with twice as many after each failure in succession


@dataclass
class _Failing:
    pauses: Iterator[float] = field(default_factory=lambda: pauses(FIRST_PAUSE, LONGEST_PAUSE))
    due: float = 0.0
    count: int = 0


class Retries:
    """Of one replica's batches, by their ids. `clock` is the event loop's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failing: dict[str, _Failing] = {}

    def is_due(self, batch_id: str) -> bool:
        return batch_id not in self._failing or self._clock() >= self._failing[batch_id].due

    def failed(self, batch_id: str, counts: bool) -> int:
        """It has failed again → how often in succession, of those failures that count."""
        failing = self._failing.setdefault(batch_id, _Failing())
        failing.due = self._clock() + next(failing.pauses)
        failing.count += counts
        return failing.count

    def forget(self, batch_id: str) -> None:
        """It has come further: what has failed before is over."""
        self._failing.pop(batch_id, None)

    def keep(self, batch_ids: Collection[str]) -> None:
        """No others are left to be run."""
        self._failing = {batch_id: failing for batch_id, failing in self._failing.items() if batch_id in batch_ids}
