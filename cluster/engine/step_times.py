"""How long steps take by their rows, measured while they run. Pure: times are told."""

from __future__ import annotations

import math
from dataclasses import dataclass

KEEP_SECONDS = 0.9  # of older times, at each; at first the mean
SETTLED = 30  # times that a kind of step was measured, after which a change of it is one of the machine
HALF_AS_SURE = 50  # steps after which a measurement counts half as much as a new one
FORGET_AFTER = 3000  # steps after which a time is not believed any more


@dataclass
class _Mean:
    """What was measured of about so many rows."""

    rows: float
    seconds: float
    times: int = 0
    last: int = 0  # the step of its last measurement

    def add(self, rows: int, seconds: float) -> None:
        if self.times and 3 * seconds < self.seconds:  # what came before was a hiccup of the machine, or all of it slow
            self.rows, self.seconds, self.times = float(rows), seconds, 1 if self.times >= SETTLED else 0
        if self.times == 1 and seconds < self.seconds:  # nothing that a step of its kind touches was in a cache
            self.rows, self.seconds = float(rows), seconds
        if self.times >= 3:  # a hiccup of the machine is not the step's
            seconds = min(seconds, 3 * self.seconds)
        self.times += 1
        share = max(1 - KEEP_SECONDS, 1 / self.times)
        self.rows += (rows - self.rows) * share
        self.seconds += (seconds - self.seconds) * share


class Times:
    """Measured seconds by a number of rows: exact for few rows, by ever wider classes for many; straight lines between
    what was measured. Beyond it, and before, the shape of a step of a mixture of experts: with `k` of `E` experts for
    each row, r rows read a share of 1 - (1 - k/E)^r of them. That is taken for cheaper than it may be, for what is
    tried is measured, and what is not stays unknown; what was measured long ago is forgotten, and one measurement is
    none. What makes some rows slower, a neighbour on the machine or longer contexts, makes all of them slower: else
    what was measured in a bad time would not be tried again."""

    def __init__(self, experts: int, top_k: int):
        self._missed = 1 - top_k / experts if experts else 0.0
        self._classes: dict[int, _Mean] = {}
        self._passed = 0  # steps
        self._points: list[tuple[float, float]] | None = None

    def add(self, rows: int, seconds: float, steps: int = 1) -> float:
        """By what factor steps have become slower, as far as this tells. `steps`: for how many this one stands, of
        which it alone was measured."""
        self._passed += steps
        mean = self._classes.setdefault(self._class(rows), _Mean(rows, seconds))
        before, was_known = mean.seconds, mean.times >= SETTLED
        mean.add(rows, seconds)
        mean.last = self._passed
        self._points = None
        slower = mean.seconds / before if was_known and before > 0 else 1.0
        self.slow_down(slower, but=mean)
        return slower

    def slow_down(self, factor: float, but: _Mean | None = None) -> None:
        for mean in self._classes.values():
            if mean is not but:
                mean.seconds *= factor
        self._points = None

    def _rising(self) -> list[tuple[float, float]]:
        """(rows, seconds) of what was measured and is not forgotten. More rows never take less time: where it seems so,
        one of the two was disturbed, and they are made one by how often each was measured, and how lately."""
        runs: list[tuple[list[float], float, float]] = []  # (rows of each, seconds, weight)
        for mean in sorted(self._classes.values(), key=lambda one: one.rows):
            if mean.times < 2 or self._passed - mean.last > FORGET_AFTER:
                continue
            weight = min(float(mean.times), 1 / (1 - KEEP_SECONDS)) * 0.5 ** ((self._passed - mean.last) / HALF_AS_SURE)
            run = ([mean.rows], mean.seconds, weight)
            while runs and runs[-1][1] > run[1]:
                before, weight = runs.pop(), run[2]
                weight += before[2]
                run = (before[0] + run[0], (before[1] * before[2] + run[1] * run[2]) / weight, weight)
            runs.append(run)
        return [(rows, seconds) for many, seconds, _ in runs for rows in many]

    @staticmethod
    def _class(rows: int) -> int:
        return rows if rows <= 12 else 12 + round(6 * math.log2(rows / 12))

    def knows(self, rows: int) -> bool:
        """Whether steps of about so many rows were measured more than once."""
        found = self._classes.get(self._class(rows))
        return found is not None and found.times > 1

    def _shape(self, rows: float) -> float:
        return float(0.9 + (1 - self._missed**rows) / max(1e-9, 1 - self._missed) * 0.08 + 0.02 * rows)

    def of(self, rows: float) -> float | None:
        """Expected seconds; None while nothing was measured twice."""
        if self._points is None:
            self._points = self._rising()
        points = self._points
        if not points:
            return None
        before = None
        for point in points:
            if point[0] >= rows:
                if before is None:
                    break
                share = (rows - before[0]) / (point[0] - before[0])
                return before[1] + (point[1] - before[1]) * share
            before = point
        nearest = points[0] if before is None else before
        return nearest[1] * self._shape(rows) / self._shape(nearest[0])
