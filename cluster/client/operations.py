"""What happens to a cluster's operations, as events: made of looks at their list. Does not look itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from isotherm.cluster.client.params import Operation


@dataclass(frozen=True)
class OperationEvent:
    """An operation has come to a phase. `operation` is what was known of it when this was seen."""

    time: float  # seconds since the epoch
    id: str
    phase: str
    operation: Operation


class OperationEvents:
    """Tells each phase of each operation once, also one that was over before it was looked at."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, float]] | None = None

    def new(self, operations: Iterable[Operation]) -> list[OperationEvent]:
        """What has happened since the last look, oldest first. Nothing at the first look: that was before."""
        events = [
            OperationEvent(when, operation["id"], phase, operation)
            for operation in operations
            for phase, when in operation["entered"].items()
        ]
        before = self._seen
        # The time too: a cluster that was started anew counts its operations from the beginning.
        self._seen = {(event.id, event.phase, event.time) for event in events}
        if before is None:
            return []
        return sorted((e for e in events if (e.id, e.phase, e.time) not in before), key=lambda event: event.time)
