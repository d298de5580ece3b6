"""How many drafts each stream of a step has: as many as make the expected tokens per second of the whole step largest,
down to none.

Gains come from measured acceptance, by position and by request; costs from measured times: of steps by their rows, and
of the drafting model's passes by theirs. A verified row is not free: its experts may be ones that no other row of the
step reads, so time grows with rows until all experts are read. What pays nothing is tried again now and then, and what
pays is now and then compared with a step without it, so that a decision can be taken back. Nothing here can change a
token. Pure: times are told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from isotherm.cluster.engine.drafts import Candidate
from isotherm.cluster.engine.sequence import ScheduledSequence

MARGIN = 1.03  # by which drafts must be expected to be faster than none: figures are noisy
PRIOR, PRIOR_WEIGHT = 0.7, 3.0  # acceptance that is believed in before anything was tried, and tries that it counts for
REQUEST_WEIGHT = 6.0  # tries of one request after which its own acceptance counts as much as everybody's
KEEP_ALL, KEEP_REQUEST = 0.99, 0.96  # of older tries, at each
KEEP_SECONDS = 0.9  # of older times, at each; at first the mean
PROBE_AFTER, PROBE_MOST = 256, 4096  # steps without drafts before one stream has some again; doubled each time in vain
PROBE_STEPS = 6  # steps that a probe takes
PLAIN_EVERY = 96  # steps with drafts, after which one without is timed
FORGET_AFTER = 3000  # measurements, after which a time is not believed any more
DECIDE_EVERY = 8  # steps of the same streams for which one decision holds: it takes time itself
EVALUATIONS = 24  # lengths of a step that are compared


@dataclass
class Tries:
    """Acceptance by position: the n-th draft of a step, given that those before it were right."""

    keep: float
    tried: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    planned: int | None = None  # drafts that the stream has till the next decision

    def add(self, drafted: int, accepted: int) -> None:
        while len(self.tried) < drafted:
            self.tried.append(0.0)
            self.right.append(0.0)
        for at in range(min(drafted, accepted + 1)):
            self.tried[at] = self.tried[at] * self.keep + 1
            self.right[at] = self.right[at] * self.keep + (at < accepted)

    def rate(self, at: int, prior: float, weight: float) -> float:
        tried, right = (self.tried[at], self.right[at]) if at < len(self.tried) else (0.0, 0.0)
        return (right + prior * weight) / (tried + weight)


@dataclass
class _Mean:
    """What was measured of about so many rows."""

    rows: float
    seconds: float
    times: int = 0
    last: int = 0  # the number of its last measurement among those of all rows

    def add(self, rows: int, seconds: float) -> None:
        if self.times and 3 * seconds < self.seconds:  # what came before was a hiccup of the machine
            self.times = 0
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
    tried is measured, and what is not stays unknown; what was measured long ago is forgotten."""

    def __init__(self, experts: int, top_k: int):
        self._missed = 1 - top_k / experts if experts else 0.0
        self._classes: dict[int, _Mean] = {}
        self._added = 0
        self._points: list[tuple[float, float]] | None = None

    def add(self, rows: int, seconds: float) -> None:
        self._added += 1
        mean = self._classes.setdefault(self._class(rows), _Mean(rows, seconds))
        mean.add(rows, seconds)
        mean.last = self._added
        self._points = None

    def _rising(self) -> list[tuple[float, float]]:
        """(rows, seconds) of what was measured and is not forgotten. More rows never take less time: where it seems so,
        one of the two was disturbed, and they are made one by how often each was measured."""
        runs: list[tuple[list[float], float, float]] = []  # (rows of each, seconds, weight)
        for mean in sorted(self._classes.values(), key=lambda one: one.rows):
            if self._added - mean.last > FORGET_AFTER:
                continue
            run = ([mean.rows], mean.seconds, min(float(mean.times), 1 / (1 - KEEP_SECONDS)))
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
        """Expected seconds; None while nothing is known."""
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


@dataclass(frozen=True)
class Choice:
    """What was decided for a step, and why."""

    drafts: int
    streams: int
    gain: float  # expected speed ÷ that without drafts
    why: str


class DraftLengths:
    """`experts`, `top_k`: of the model's MoE layers, for the shape of a step's time; 0 where it has none. `has_passes`:
    the drafter computes: one pass for each draft of a stream, of all streams together."""

    def __init__(self, experts: int, top_k: int, has_passes: bool):
        self._steps, self._passes = Times(experts, top_k), Times(experts, top_k)
        self._has_passes = has_passes
        self._all = Tries(KEEP_ALL)
        self._idle = 0  # steps in a row without drafts
        self._probe_after, self._probing = PROBE_AFTER, 0
        self._since_plain = 0
        self._planned_for = self._decided = 0  # streams, and steps since
        self.choice = Choice(0, 0, 1.0, "nothing was decided yet")

    # --- what came of it --------------------------------------------------------------------------

    def verified(self, sequence: ScheduledSequence, drafted: int, accepted: int) -> None:
        self._all.add(drafted, accepted)
        self._own(sequence).add(drafted, accepted)

    def _own(self, sequence: ScheduledSequence) -> Tries:
        own = sequence.acceptance
        if not isinstance(own, Tries):
            own = sequence.acceptance = Tries(KEEP_REQUEST)
        return own

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows, all in decode form, without what drafting took."""
        self._steps.add(rows, seconds)

    def drafting_took(self, rows: Sequence[int], seconds: float) -> None:
        """The passes of a step, each with its rows."""
        if rows:
            self._passes.add(round(sum(rows) / len(rows)), seconds / len(rows))

    # --- deciding ---------------------------------------------------------------------------------

    def skips_step(self) -> bool:
        """Counts a step. Whether no drafts are due in it: nobody need be asked for any."""
        if self._probing or self._idle == 0:
            return False
        self._idle += 1
        if self._idle < self._probe_after:
            return True
        self._idle, self._probing = 0, PROBE_STEPS
        self._probe_after = min(PROBE_MOST, 2 * self._probe_after)
        return False

    @property
    def steps_to_probe(self) -> int:
        """How many steps from now there may be drafts; 0 where there are some."""
        return 0 if self._probing or self._idle == 0 else self._probe_after - self._idle

    def choose(self, rows: int, found: Sequence[Candidate]) -> list[Candidate]:
        """`rows` of a step without drafts → the candidates that have some, with `count` set."""
        if not found or self._steps.of(rows) is None or self._since_plain >= PLAIN_EVERY:
            self._since_plain = 0
            return []  # the last two: a step without drafts is timed
        if (kept := self._as_planned(found)) is not None:
            self._since_plain += 1
            return kept
        ordered = self._gains(found)
        drafts, gain = self._best(rows, ordered)
        if drafts:
            self._idle, self._probing, self._probe_after = 0, 0, PROBE_AFTER
            self._since_plain += 1
        elif self._probing:
            self._probing -= 1
            if not self._probing:
                self._idle = 1
            newest = max(found, key=lambda one: one.sequence.arrival)
            newest.count = 1
            self.choice = Choice(1, 1, gain, "a probe: none paid of late")
            return [newest]
        else:
            self._idle = 1
        for _, one in ordered[:drafts]:
            one.count += 1
        chosen = [one for one in found if one.count]
        holds = drafts > 0 and self._steps.knows(rows + drafts)  # what is only guessed at is looked at again at once
        self._planned_for, self._decided = len(found) if holds else 0, 0
        for one in found:
            self._own(one.sequence).planned = one.count
        first = self._all.rate(0, PRIOR, PRIOR_WEIGHT)
        why = f"{first:.0%} of first drafts are right, {drafts} drafts for {len(chosen)} of {len(found)} streams"
        self.choice = Choice(drafts, len(chosen), gain, f"{why}: {gain:.2f} × the speed without")
        return chosen

    def _as_planned(self, found: Sequence[Candidate]) -> list[Candidate] | None:
        """What was decided a few steps ago, where it was decided for these streams."""
        self._decided += 1
        if len(found) != self._planned_for or self._decided >= DECIDE_EVERY:
            return None
        for one in found:
            if (planned := self._own(one.sequence).planned) is None:
                return None
            one.count = min(planned, one.most)
        return [one for one in found if one.count]

    def _gains(self, found: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
        """Every draft that could be made with the chance that it is taken, likeliest first: so a stream's n-th comes
        before its next."""
        everybody = [self._all.rate(at, PRIOR, PRIOR_WEIGHT) for at in range(max((c.most for c in found), default=0))]
        gains = []
        for one in found:
            one.count = 0
            own, chance = self._own(one.sequence), 1.0
            for at in range(one.most):
                chance *= own.rate(at, everybody[at], REQUEST_WEIGHT)
                gains.append((chance, one))
        gains.sort(key=lambda gain: -gain[0])
        return gains

    def _best(self, rows: int, ordered: Sequence[tuple[float, Candidate]]) -> tuple[int, float]:
        """How many of the drafts are to be made, and the expected gain in speed."""
        plain = self._steps.of(rows)
        assert plain is not None
        per_second = rows / plain
        best, best_rate = 0, per_second * MARGIN
        stride = max(1, len(ordered) // EVALUATIONS)
        taken = 0.0
        depth: dict[int, int] = {}  # chunk → its drafts
        by_depth: list[int] = []  # streams that have an n-th draft
        for at, (chance, one) in enumerate(ordered, 1):
            taken += chance
            mine = depth[one.chunk] = depth.get(one.chunk, 0) + 1
            if mine > len(by_depth):
                by_depth.append(0)
            by_depth[mine - 1] += 1
            if at % stride and at != len(ordered):
                continue
            seconds = (self._steps.of(rows + at) or plain) + self._drafting(by_depth, plain)
            if (rate := (rows + taken) / seconds) > best_rate:
                best, best_rate = at, rate
        return best, best_rate / per_second if best else 1.0

    def _drafting(self, by_depth: Sequence[int], plain: float) -> float:
        if not self._has_passes:
            return 0.0
        return sum(plain / 4 if (known := self._passes.of(n)) is None else known for n in by_depth)
