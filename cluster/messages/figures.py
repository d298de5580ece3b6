"""Counters and histograms as workers and ingress replicas keep them and hand them on: cheap to add to, whole numbers
since a start, the names and labels that Prometheus sees."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

OTHER = "other"  # the label of all that come after the first `most`


@dataclass(frozen=True)
class Metric:
    """`bounds`: upper ends of a histogram's buckets, ascending; a last one without an end comes on top."""

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram"] = "counter"
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Buckets:
    """A histogram at one moment: how many values fell into each bucket alone, and their sum."""

    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Family:
    """A metric with its values by label values."""

    metric: Metric
    values: Mapping[tuple[str, ...], float | Buckets]


Figures = Sequence[Family]


class Histogram:
    """One thread adds, and never waits for those who read; what these see may lack the value that is being added."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def read(self) -> Buckets:
        return Buckets(tuple(self._counts), self._total)


class Tally:
    """Counters and histograms with labels, made as they are first added to."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = tuple(metrics)
        # By the metric's name, whose hash is known: they are looked for many times a request
        self._counts: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        for metric in self._metrics:
            if metric.kind == "histogram":
                self._histograms[metric.name] = {} if metric.labels else {(): Histogram(metric.bounds)}
            else:
                self._counts[metric.name] = {} if metric.labels else {(): 0.0}

    def add(self, metric: Metric, labels: tuple[str, ...] = (), amount: float = 1.0) -> None:
        counts = self._counts[metric.name]
        counts[labels] = counts.get(labels, 0.0) + amount

    def observe(self, metric: Metric, value: float, labels: tuple[str, ...] = ()) -> None:
        histograms = self._histograms[metric.name]
        if (histogram := histograms.get(labels)) is None:
            histogram = histograms[labels] = Histogram(metric.bounds)
        histogram.add(value)

    def read(self) -> list[Family]:
        found = []
        for metric in self._metrics:
            if metric.kind == "histogram":
                found.append(Family(metric, {key: h.read() for key, h in self._histograms[metric.name].items()}))
            else:
                found.append(Family(metric, dict(self._counts[metric.name])))
        return found


class BoundedLabels:
    """The first `most` values of a label as they are, and one word for all that come later: the number of series must
    not depend on who sends what."""

    def __init__(self, most: int):
        self._most = most
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value
