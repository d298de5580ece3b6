"""What the event stream tells: named values that change, and what has changed since a moment. Pure, and bounded:
nothing is kept for those who listen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from isotherm.cluster.jsontypes import JSON, JSONValue

TOMBSTONES = 2048  # names that are gone and still remembered


@dataclass(frozen=True)
class FeedPart:
    """What there is, or what has changed. `snapshot`: `values` is all there is, and what a listener knew before is
    void. `id` is what a listener says who wants to go on from here."""

    id: str
    snapshot: bool
    values: Mapping[str, JSONValue] = field(default_factory=dict)
    gone: tuple[str, ...] = ()

    @property
    def event(self) -> str:
        return "snapshot" if self.snapshot else "change"

    def as_dict(self) -> JSON:
        return {"set": dict(self.values), "gone": list(self.gone)}


class FeedTable:
    """Values by name, each with the version at which it came to be. `epoch` tells this table from others before and
    beside it: a listener who comes from another one is told all. A listener who is slow gets the newest values only."""

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self.version = 0
        self._values: dict[str, tuple[int, JSONValue]] = {}
        self._gone: dict[str, int] = {}  # oldest first
        self._forgotten = 0  # the newest version of which a tombstone is no longer there

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def put(self, name: str, value: JSONValue) -> None:
        """The value must not be changed afterwards."""
        known = self._values.get(name)
        if known is None or known[1] != value:
            self.version += 1
            self._values[name] = (self.version, value)
            self._gone.pop(name, None)

    def drop(self, name: str) -> None:
        if self._values.pop(name, None) is not None:
            self.version += 1
            self._gone[name] = self.version
            while len(self._gone) > TOMBSTONES:
                self._forgotten = self._gone.pop(next(iter(self._gone)))

    def replace(self, prefix: str, values: Mapping[str, JSONValue]) -> None:
        """Make these all the values whose names begin so; names are given without the prefix."""
        for name in [n for n in self._values if n.startswith(prefix) and n.removeprefix(prefix) not in values]:
            self.drop(name)
        for name, value in values.items():
            self.put(prefix + name, value)

    def since(self, last: str) -> FeedPart | None:
        """What a listener does not know whose last part was `last`; None where that is nothing. Everything, for one who
        has heard nothing, or too long ago."""
        epoch, _, number = last.rpartition(":")
        version = int(number) if number.isascii() and number.isdecimal() and len(number) < 20 else -1
        if epoch != self._epoch or not self._forgotten <= version <= self.version:
            return FeedPart(self._id(), True, {name: value for name, (_, value) in self._values.items()})
        if version == self.version:
            return None
        values = {name: value for name, (at, value) in self._values.items() if at > version}
        return FeedPart(self._id(), False, values, tuple(name for name, at in self._gone.items() if at > version))

    def _id(self) -> str:
        return f"{self._epoch}:{self.version}"
