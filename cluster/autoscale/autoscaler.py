"""What the autoscaler decides: copies of experts, groups and shards, from the load. Pure: observations with their time
in, decisions out.

One decision at a time. Each reason must have held for a time, thresholds up and down lie apart, and after each change
there is a pause; a change that fails, or had to be taken back, makes the next pause longer. Where experts go is decided
in cluster/placement/policy.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import AutoscalingSection, Manifest
from isotherm.cluster.placement.policy import Plan

COPIES, GROUPS, SHARDS = "copies", "expert_groups", "attention_shards"
LONGEST_PAUSE = 900.0  # seconds that failures can make a pause
MOST_DOUBLINGS = 20  # of a pause: beyond the longest one in any case
STEADY = 4  # a change back within this many holding times counts as flapping
MOST_STRIKES = 5  # each doubles the time for which a worker must have been one too many: 32 times as long at most


@dataclass(frozen=True)
class Bounds:
    """How many workers of one kind there may be; None: their number is not the autoscaler's."""

    least: int
    most: int


def bounds(low: int | None, high: int | None, initial: int) -> Bounds | None:
    """From a manifest's `min` and `max`. One that is absent is the initial number, or the other where that is beyond
    it."""
    if low is None and high is None:
        return None
    least = min(initial, high or initial) if low is None else low
    return Bounds(least, max(initial, least) if high is None else high)


@dataclass(frozen=True)
class Limits:
    """What is to be kept to; from the manifest."""

    config: AutoscalingSection
    groups: Bounds | None
    shards: Bounds | None
    group_memory: int = 0  # bytes that each group reserves; 0: not known

    @staticmethod
    def of(manifest: Manifest, moe: bool = True) -> Limits:
        """`moe`: whether the model has routed experts."""
        c = manifest.autoscaling
        groups = bounds(c.expert_groups.min, c.expert_groups.max, manifest.experts.groups) if moe else None
        shards = bounds(c.attention_shards.min, c.attention_shards.max, manifest.attention.shards)
        return Limits(c, groups, shards, manifest.experts.memory)


@dataclass(frozen=True)
class Observation:
    """The cluster at one moment. `group_count` and `shard_count` include workers that have reported nothing lately."""

    now: float
    groups: tuple[GroupLoad, ...]
    shards: tuple[ShardLoad, ...]
    group_count: int
    shard_count: int
    plan: Plan | None = None  # what the policy would do about the experts; None: it has not seen enough


@dataclass(frozen=True)
class Decision:
    """Go to `count` workers (of `kind` GROUPS or SHARDS), or to the plan's placement (COPIES)."""

    kind: str
    reason: str
    figures: Mapping[str, float]
    count: int = 0
    plan: Plan | None = None


@dataclass
class _Pause:
    """Of one kind of change."""

    until: float = float("-inf")
    failures: int = 0
    last_down: float = float("-inf")
    strikes: int = 0  # times that a worker was taken away too early


@dataclass(frozen=True)
class Case:
    """What speaks for another number of workers than there is."""

    up: list[str]  # reasons for more
    want: int  # how many there should be then
    down: str | None  # the reason for one fewer
    figures: Mapping[str, float]


@dataclass
class Autoscaler:
    """Holds since when each reason has been there, and the pauses. `decide` may be called at any times that do not go
    back."""

    limits: Limits
    _since: dict[str, float] = field(default_factory=dict)
    _pauses: dict[str, _Pause] = field(default_factory=lambda: {kind: _Pause() for kind in (COPIES, GROUPS, SHARDS)})

    def decide(self, seen: Observation, kinds: Collection[str] = (GROUPS, SHARDS, COPIES)) -> Decision | None:
        """The one thing to do now, if any, of these kinds; the caller does it, or (mode `advise`) writes it down, and
        either way a pause begins. Workers come before copies: with more groups, copies are placed differently."""
        if self.limits.config.mode == "off":
            return None
        # All are asked each time, since each keeps the time for which its reason has held.
        wishes = [self._groups(seen), self._shards(seen), self._copies(seen)]
        for decision in wishes:
            if decision is not None and decision.kind in kinds:
                self._begin_pause(decision, seen)
                return decision
        return None

    def failed(self, decision: Decision, now: float) -> float:
        """The change could not be made: the seconds after which it may be tried again, longer each time."""
        pause = self._pauses[decision.kind]
        pause.failures += 1
        seconds = min(
            LONGEST_PAUSE, max(self._cooldown(decision.kind), 1.0) * 2.0 ** min(pause.failures, MOST_DOUBLINGS)
        )
        pause.until = now + seconds
        return seconds

    def succeeded(self, decision: Decision, now: float) -> None:
        """The change was made: the pause begins here, so that the load can show what it did."""
        pause = self._pauses[decision.kind]
        pause.failures = 0
        pause.until = now + self._cooldown(decision.kind)
        for reason in [r for r in self._since if r.startswith(decision.kind)]:
            del self._since[reason]

    def dump(self, now: float) -> JSON:
        """The pauses as JSON values, for a controller that comes back, whose clock is another one: times count from
        now."""

        def saved(pause: _Pause) -> JSON:
            down = None if math.isinf(pause.last_down) else now - pause.last_down
            return {
                "left": max(0.0, pause.until - now),
                "failures": pause.failures,
                "down": down,
                "strikes": pause.strikes,
            }

        return {kind: saved(pause) for kind, pause in self._pauses.items()}

    def load(self, data: Mapping[str, Any], now: float, elapsed: float) -> None:
        """Go on with the pauses that `dump` gave `elapsed` seconds ago."""
        for kind, saved in data.items():
            last_down = float("-inf") if saved["down"] is None else now - elapsed - saved["down"]
            self._pauses[kind] = _Pause(
                now + max(0.0, saved["left"] - elapsed), saved["failures"], last_down, saved["strikes"]
            )

    # --- holding ----------------------------------------------------------------------------------

    def _cooldown(self, kind: str) -> float:
        return self.limits.config.copies.cooldown if kind == COPIES else self.limits.config.cooldown

    def _held(self, reason: str, holds: bool, now: float, seconds: float) -> bool:
        """Whether a reason has been there, at every look, for so long."""
        if not holds:
            self._since.pop(reason, None)
            return False
        return now - self._since.setdefault(reason, now) >= seconds

    def _begin_pause(self, decision: Decision, seen: Observation) -> None:
        pause = self._pauses[decision.kind]
        pause.until = seen.now + self._cooldown(decision.kind)
        if decision.kind == COPIES:
            return
        count = seen.group_count if decision.kind == GROUPS else seen.shard_count
        if decision.count < count:
            if seen.now - pause.last_down > STEADY * self._down_after(pause):
                pause.strikes = max(pause.strikes - 1, 0)  # the last one taken away was not missed
            pause.last_down = seen.now
        elif seen.now - pause.last_down < STEADY * self._down_after(pause):
            pause.strikes = min(pause.strikes + 1, MOST_STRIKES)

    def _down_after(self, pause: _Pause) -> float:
        return self.limits.config.down_after * 2.0**pause.strikes

    # --- the three kinds --------------------------------------------------------------------------

    def _copies(self, seen: Observation) -> Decision | None:
        c, plan = self.limits.config.copies, seen.plan
        if not c.enabled or plan is None:
            self._since.pop(COPIES, None)
            return None
        gain = plan.imbalance_before - plan.imbalance_after
        wanted = bool(plan.steps) and plan.imbalance_before > c.above and gain >= c.gain
        if not self._held(COPIES, wanted, seen.now, c.after) or seen.now < self._pauses[COPIES].until:
            return None
        figures = {
            "imbalance": plan.imbalance_before,
            "imbalance_expected": plan.imbalance_after,
            "heat": plan.heat_before,
            "heat_expected": plan.heat_after,
            "loads": plan.loads,
            "steps": len(plan.steps),
        }
        reason = (
            f"the hottest group has {plan.imbalance_before:.3f} × the mean group's load, mean of the layers (above "
            f"{c.above:g}); loading {plan.loads} copies should make it {plan.imbalance_after:.3f} (all layers: "
            f"{plan.heat_before:.3f} → {plan.heat_after:.3f})"
        )
        return Decision(COPIES, reason, figures, plan=plan)

    def _groups(self, seen: Observation) -> Decision | None:
        limits, c, n = self.limits, self.limits.config.expert_groups, seen.group_count
        if limits.groups is None or not seen.groups:
            return None
        busy = sum(g.busy for g in seen.groups) / len(seen.groups)
        fullest = max(g.weight_bytes for g in seen.groups) / limits.group_memory if limits.group_memory else 0.0
        figures = {"groups": n, "busy": busy, "memory": fullest}
        fewer = n / max(n - 1, 1)
        reasons = []
        if busy > c.busy_above:
            reasons.append(f"groups compute {busy:.0%} of the time (above {c.busy_above:.0%})")
        if fullest > c.memory_above:
            reasons.append(f"the fullest has {fullest:.0%} of its memory in weights (above {c.memory_above:.0%})")
        idle = busy * fewer < c.busy_below and fullest * fewer < c.memory_above
        down = (
            f"groups compute {busy:.0%} of the time, and would {busy * fewer:.0%} with one fewer "
            f"(below {c.busy_below:.0%})"
        )
        # So many that they would be as busy as the middle between the thresholds; at most twice as many at once.
        want = math.ceil(n * busy / ((c.busy_above + c.busy_below) / 2))
        case = Case(reasons, want, down if idle else None, figures)
        return self._count(GROUPS, limits.groups, n, len(seen.groups), case, seen.now)

    def _shards(self, seen: Observation) -> Decision | None:
        limits, c, n = self.limits, self.limits.config.attention_shards, seen.shard_count
        if limits.shards is None or not seen.shards:
            return None
        mean = len(seen.shards)
        waiting, running = sum(s.waiting for s in seen.shards) / mean, sum(s.running for s in seen.shards) / mean
        kv, first = sum(s.kv_used for s in seen.shards) / mean, max(s.first_token_seconds for s in seen.shards)
        capacity = min(s.capacity for s in seen.shards)
        figures = {"shards": n, "waiting": waiting, "running": running, "kv_used": kv, "first_token_seconds": first}
        fewer = n / max(n - 1, 1)
        reasons = []
        if waiting > c.waiting_above:
            reasons.append(f"{waiting:.1f} requests wait at each shard (above {c.waiting_above:g})")
        if kv > c.kv_above:
            reasons.append(f"{kv:.0%} of the KV blocks are in use (above {c.kv_above:.0%})")
        if first > c.first_token_above:
            reasons.append(f"a first token takes {first:.1f} s (above {c.first_token_above:g} s)")
        idle = (
            waiting == 0
            and kv * fewer < c.kv_below
            and running * fewer < capacity / 2
            and first < c.first_token_above / 2
        )
        down = (
            f"nothing waits, {kv:.0%} of the KV blocks are used, and would be {kv * fewer:.0%} with one shard fewer "
            f"(below {c.kv_below:.0%})"
        )
        want = math.ceil(n * max(kv / c.kv_above, (running + waiting) / max(running, 1.0)))
        case = Case(reasons, want, down if idle else None, figures)
        return self._count(SHARDS, limits.shards, n, mean, case, seen.now)

    def _count(self, kind: str, bounds: Bounds, have: int, heard: int, case: Case, now: float) -> Decision | None:
        config, pause = self.limits.config, self._pauses[kind]
        more = self._held(f"{kind} up", bool(case.up), now, config.up_after)
        # Not on the word of some while others are silent: they may be the busy ones.
        fewer = self._held(f"{kind} down", case.down is not None and heard == have, now, self._down_after(pause))
        if now < pause.until:
            return None
        if have < bounds.least:
            return Decision(
                kind, f"there are {have}, and at least {bounds.least} are to be", case.figures, bounds.least
            )
        if more and have < bounds.most:
            count = min(bounds.most, max(have + 1, min(case.want, 2 * have)))
            return Decision(
                kind,
                f"{'; '.join(case.up)}, for {now - self._since[f'{kind} up']:.0f} s: {have} → {count}",
                case.figures,
                count,
            )
        if fewer and have > bounds.least:
            return Decision(
                kind,
                f"{case.down}, for {now - self._since[f'{kind} down']:.0f} s: {have} → {have - 1}",
                case.figures,
                have - 1,
            )
        return None
