"""How many drafts each stream of a step has: as many as make the expected tokens per second of the whole step largest,
down to none.

Gains come from measured acceptance, by position and by request; costs from measured times: of steps by their rows, and
of the drafting model's passes by theirs. A verified row is not free: its experts may be ones that no other row of the
step reads, so time grows with rows until all experts are read. What pays nothing is tried again now and then, and what
pays is now and then compared with a step without it, so that a decision can be taken back. Nothing here can change a
token. Pure: times are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from isotherm.cluster.engine.drafts import Candidate
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.engine.step_times import Times

MARGIN = 1.03  # by which drafts must be expected to be faster than none: figures are noisy
PRIOR, PRIOR_WEIGHT = 0.8, 6.0  # acceptance that is believed in before anything was tried, and tries that it counts for
DEEPER_WEIGHT = 8.0  # tries that the acceptance of the guess before it counts for
REQUEST_WEIGHT = 6.0  # tries of one request after which its own acceptance counts as much as everybody's
LATER_AT_LEAST = 0.3  # of the time of several passes, what those after the first took
KEEP_ALL, KEEP_REQUEST = 0.99, 0.96  # of older tries, at each
# Steps without drafts before one stream has some again, doubled each time in vain: at first, when what was tried was
# done for the first time; then; and at most
PROBE_FIRST, PROBE_AFTER, PROBE_MOST = 32, 256, 1024
PROBE_STEPS = 6  # steps that a probe takes
NEARLY = 0.9  # of the speed without drafts: what a probe is to come to, for the next one to come soon
FADED = 0.5  # of older tries, at each probe: other streams have come meanwhile
PLAIN_EVERY = 96  # steps with drafts, after which one without is timed
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

    def fade(self, share: float) -> None:
        """Make what was tried count for so much less."""
        self.tried = [one * share for one in self.tried]
        self.right = [one * share for one in self.right]

    def rate(self, at: int, prior: float, weight: float) -> float:
        tried, right = (self.tried[at], self.right[at]) if at < len(self.tried) else (0.0, 0.0)
        return (right + prior * weight) / (tried + weight)


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
        self._steps = Times(experts, top_k)
        # A drafter's first pass, with all that is done once, and each one after it, by streams
        self._first, self._later = Times(experts, top_k), Times(experts, top_k)
        self._has_passes, self._has_drafted = has_passes, False
        self._all = Tries(KEEP_ALL)
        self._idle = 0  # steps in a row without drafts
        self._probe_after, self._probing = PROBE_FIRST, 0
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

    def took(self, rows: int, seconds: float, steps: int = 1) -> None:
        """A step of so many rows, all in decode form, without what drafting took; it stands for so many steps."""
        slower = self._steps.add(rows, seconds, steps)
        if not self._has_drafted:
            for times in (self._first, self._later):
                times.slow_down(slower)
        self._has_drafted = False

    def drafting_took(self, streams: Sequence[int], seconds: float) -> None:
        """The passes of a step, by the streams in each. What is told is their sum: the first is taken for what it was
        when it was alone, and before that for twice a later one."""
        if not streams:
            return
        self._has_drafted = True
        first, later = streams[0], streams[1:]
        once = self._first.of(first)
        if not later or once is None:
            self._first.add(first, once := seconds * 2 / (2 + len(later)))
        if later:
            rest = max(seconds - once, LATER_AT_LEAST * seconds)
            self._later.add(round(sum(later) / len(later)), rest / len(later))

    # --- deciding ---------------------------------------------------------------------------------

    def skips_step(self) -> bool:
        """Counts a step. Whether no drafts are due in it: nobody need be asked for any."""
        if self._probing or self._idle == 0:
            return False
        self._idle += 1
        if self._idle < self._probe_after:
            return True
        self._idle, self._probing = 0, PROBE_STEPS
        self._all.fade(FADED)
        self._probe_after = min(PROBE_MOST, 2 * self._probe_after)
        return False

    def pass_over(self, most: int, listening: int) -> int:
        """Steps in which no drafts are due, counted all at once: at most so many, and none of the `listening` ones
        before a probe → how many."""
        steps = max(0, min(most, self.steps_to_probe - 1 - listening))
        self._idle += steps
        return steps

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
        if gain > MARGIN:
            self._idle, self._probing, self._probe_after = 0, 0, PROBE_AFTER
            self._since_plain += 1
        elif self._probing:
            return self._probe(rows, found, ordered)
        else:
            self._idle, drafts, gain = 1, 0, 1.0
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

    def _probe(
        self, rows: int, found: Sequence[Candidate], ordered: Sequence[tuple[float, Candidate]]
    ) -> list[Candidate]:
        """The newest stream has the drafts that would lose least; or more, if these would pay were later ones right as
        often as the first: what is known of later ones is of other streams, until they are tried. Where it loses
        little, the next probe comes soon."""
        self._probing -= 1
        newest = max(found, key=lambda one: one.sequence.arrival)
        mine = [(chance, one) for chance, one in ordered if one is newest]
        newest.count, gain = self._best(rows, mine)
        deeper, hoped = self._best(rows, [(mine[0][0] ** at, newest) for at in range(1, 1 + len(mine))])
        if hoped > MARGIN:
            newest.count = deeper
        if not self._probing:
            self._idle = 1
            if gain > NEARLY:
                self._probe_after = PROBE_AFTER
        self.choice = Choice(newest.count, 1, gain, "a probe: none paid of late")
        return [newest]

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
        everybody: list[float] = []
        for at in range(max((one.most for one in found), default=0)):
            everybody.append(
                self._all.rate(at, everybody[-1], DEEPER_WEIGHT) if at else self._all.rate(0, PRIOR, PRIOR_WEIGHT)
            )
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
        """How many drafts are best, one at least, and the expected speed ÷ that without any."""
        plain = self._steps.of(rows)
        assert plain is not None
        best, best_rate = 0, 0.0
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
        return best, best_rate * plain / rows

    def _drafting(self, by_depth: Sequence[int], plain: float) -> float:
        if not self._has_passes:
            return 0.0
        first, later = by_depth[0], by_depth[1:]
        once = self._first.of(first) or plain / 4
        return once + sum(self._later.of(n) or once / 2 for n in later)
