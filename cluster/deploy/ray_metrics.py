"""The cluster's metrics once more through Ray's own: whoever scrapes Ray's nodes finds them there, with `ray_` before
their names.

Ray's counters and histograms can only be added to, one value at a time. What is counted elsewhere goes out as gauges of
the same numbers, a histogram's buckets with their `le`: rates and quantiles are taken of them all the same.

Ray cannot take a series back either. So processes, which come and go for as long as a cluster lives, are numbered here:
one that comes has the series of one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import count
from typing import Protocol

from prometheus_client.core import Metric
from ray.util.metrics import Gauge

MIRROR_SECONDS = 10.0  # between two looks
PROCESSES = frozenset({"ingress", "shard", "group"})  # labels whose values are names of processes


class Settable(Protocol):
    def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...


def _gauge(name: str, words: str, labels: tuple[str, ...]) -> Settable:
    made: Settable = Gauge(name, words, labels)  # type: ignore[assignment]  # its `tags` has no Optional
    return made


class Numbers:
    """The least numbers from 0 on for those that are there; who stays keeps its own."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}

    def keep(self, names: Collection[str]) -> None:
        """These are there now, and no others."""
        self._of = {name: number for name, number in self._of.items() if name in names}
        taken = set(self._of.values())
        free = (number for number in count() if number not in taken)
        self._of |= dict(zip(sorted(set(names) - self._of.keys()), free, strict=False))

    def of(self, name: str) -> str:
        return str(self._of[name])


class RayMirror:
    """`gauge` makes one from a name, a help text and the names of labels."""

    def __init__(self, gauge: Callable[[str, str, tuple[str, ...]], Settable] = _gauge) -> None:
        self._new = gauge
        self._gauges: dict[str, Settable] = {}
        self._shown: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        self._numbers = {label: Numbers() for label in PROCESSES}

    def show(self, families: Iterable[Metric]) -> None:
        """What is shown no more goes to 0."""
        found = [(family.documentation, sample) for family in families for sample in family.samples]
        for label, numbers in self._numbers.items():
            numbers.keep({name for _, sample in found if (name := sample.labels.get(label)) is not None})
        shown = set()
        for words, sample in found:
            series = sample.name, tuple(sorted(self._numbered(sample.labels)))
            self._set(*series, words, sample.value)
            shown.add(series)
        for name, labels in self._shown - shown:
            self._set(name, labels, "", 0.0)
        self._shown |= shown

    def _numbered(self, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for label, value in labels.items():
            yield label, self._numbers[label].of(value) if label in PROCESSES else value

    def _set(self, name: str, labels: tuple[tuple[str, str], ...], words: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = self._new(name, _ascii(words), tuple(label for label, _ in labels))
        self._gauges[name].set(value, {label: _ascii(of) for label, of in labels})


def _ascii(text: str) -> str:
    """Ray takes nothing else, and one text that it does not take would keep all the others from it."""
    return text.encode("ascii", "backslashreplace").decode()
