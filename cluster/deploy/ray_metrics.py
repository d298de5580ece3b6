"""The cluster's metrics once more through Ray's own: whoever scrapes Ray's nodes finds them there, with `ray_` before
their names.

Ray's counters and histograms can only be added to, one value at a time. What is counted elsewhere goes out as gauges of
the same numbers, a histogram's buckets with their `le`: rates and quantiles are taken of them all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client.core import Metric
from ray.util.metrics import Gauge

MIRROR_SECONDS = 10.0  # between two looks


class Settable(Protocol):
    def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...


def _gauge(name: str, words: str, labels: tuple[str, ...]) -> Settable:
    made: Settable = Gauge(name, words, labels)  # type: ignore[assignment]  # its `tags` has no Optional
    return made


class RayMirror:
    """`gauge` makes one from a name, a help text and the names of labels."""

    def __init__(self, gauge: Callable[[str, str, tuple[str, ...]], Settable] = _gauge) -> None:
        self._new = gauge
        self._gauges: dict[str, Settable] = {}
        self._shown: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def show(self, families: Iterable[Metric]) -> None:
        """What is shown no more goes to 0: Ray cannot take a series back."""
        shown = set()
        for family in families:
            for sample in family.samples:
                series = sample.name, tuple(sorted(sample.labels.items()))
                self._set(*series, family.documentation, sample.value)
                shown.add(series)
        for name, labels in self._shown - shown:
            self._set(name, labels, "", 0.0)
        self._shown |= shown

    def _set(self, name: str, labels: tuple[tuple[str, str], ...], words: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = self._new(name, _ascii(words), tuple(label for label, _ in labels))
        self._gauges[name].set(value, {label: _ascii(of) for label, of in labels})


def _ascii(text: str) -> str:
    """Ray takes nothing else, and one text that it does not take would keep all the others from it."""
    return text.encode("ascii", "backslashreplace").decode()
