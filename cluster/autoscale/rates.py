"""What workers report of their load, and the rates made of it. Pure: numbers and times in, numbers out.

Times are seconds of any one clock. What is said to be decayed counts half after each half-life.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.meters import DecayedMean, GroupMeter, ShardMeter

M = TypeVar("M")


@dataclass(frozen=True)
class ShardLoad:
    """An attention shard over the last half-lives."""

    name: str
    node: str
    running: int
    waiting: int
    capacity: int
    kv_used: float
    first_token_seconds: float  # the greater of the decayed mean and the longest wait; 0: no requests
    tokens_per_second: float
    steps_per_second: float


@dataclass(frozen=True)
class GroupLoad:
    """An expert group over the last half-lives."""

    name: str
    node: str
    busy: float  # fraction of the time that it computed
    held: float  # ... that it held messages for other shards to join
    waited: float  # ... that shards had nothing to do but wait for it, their sum
    rows_per_second: float
    batch: float  # rows of a computation
    experts: int
    weight_bytes: int


class Meters:
    """Decayed rates of every worker, from what they report now and then. A worker that reports nothing for a while
    drops out."""

    def __init__(self, half_life: float, silence: float):
        """`silence`: seconds after which a worker's last words no longer count."""
        self._half_life, self._silence = half_life, silence
        self._shards: dict[str, _Track[ShardMeter]] = {}
        self._groups: dict[str, _Track[GroupMeter]] = {}

    def observe(self, shards: Mapping[str, ShardMeter], groups: Mapping[str, GroupMeter], now: float) -> None:
        for name, shard in shards.items():
            track = self._shards.setdefault(name, _Track(self._half_life))
            waits = {f"wait {group}": seconds for group, seconds in shard.group_wait.items()}
            track.observe(shard, {"tokens": shard.tokens, "steps": shard.steps, **waits}, now)
        for name, group in groups.items():
            counts = {
                "busy": group.busy_seconds,
                "held": group.held_seconds,
                "rows": group.rows,
                "computations": group.computations,
            }
            self._groups.setdefault(name, _Track(self._half_life)).observe(group, counts, now)
        self._shards = {n: t for n, t in self._shards.items() if t.at >= now - self._silence}
        self._groups = {n: t for n, t in self._groups.items() if t.at >= now - self._silence}

    def shards(self, nodes: Mapping[str, str]) -> list[ShardLoad]:
        """Those named in `nodes` that have reported lately."""
        out = []
        for name in nodes:
            if (track := self._shards.get(name)) is not None:
                m = track.last
                first = max(m.first_token_seconds or 0.0, m.longest_wait)
                rates = track.rate("tokens"), track.rate("steps")
                out.append(ShardLoad(name, nodes[name], m.running, m.waiting, m.capacity, m.kv_used, first, *rates))
        return out

    def figures(self, shards: Collection[str]) -> dict[str, Figures]:
        """What each of the named shards that have reported lately counts itself."""
        return {name: self._shards[name].last.figures for name in shards if name in self._shards}

    def group_figures(self, groups: Collection[str]) -> dict[str, Figures]:
        """The same of groups."""
        return {name: self._groups[name].last.figures for name in groups if name in self._groups}

    def groups(self, nodes: Mapping[str, str], shards: Collection[str]) -> list[GroupLoad]:
        """As `shards`; `shards` names those whose waiting counts."""
        out = []
        for name in nodes:
            if (track := self._groups.get(name)) is not None:
                waited = sum(self._shards[s].rate(f"wait {name}") for s in shards if s in self._shards)
                rows, computations = track.rate("rows"), track.rate("computations")
                batch = rows / computations if computations else 0.0
                busy, held, m = track.rate("busy"), track.rate("held"), track.last
                out.append(
                    GroupLoad(name, nodes[name], min(busy, 1.0), held, waited, rows, batch, m.experts, m.weight_bytes)
                )
        return out


class _Track(Generic[M]):
    """One worker's last report, and decayed rates of its counts."""

    def __init__(self, half_life: float):
        self.last: M
        self.at = float("-inf")
        self._half_life = half_life
        self._counts: dict[str, float] = {}
        self._rates: dict[str, DecayedMean] = {}

    def observe(self, report: M, counts: Mapping[str, float], now: float) -> None:
        seconds = now - self.at
        if self._counts and seconds > 0:
            for name, count in counts.items():
                # A count that falls began anew: the worker's name was used again.
                change = max(0.0, count - self._counts.get(name, 0.0))
                self._rates.setdefault(name, DecayedMean(self._half_life)).add(
                    change / seconds, now, min(seconds, self._half_life)
                )
        # a shard waits for groups that come and go
        self._rates = {name: rate for name, rate in self._rates.items() if name in counts}
        self.last, self.at, self._counts = report, now, dict(counts)

    def rate(self, name: str) -> float:
        """Per second; 0 where nothing is known yet."""
        mean = self._rates.get(name)
        return 0.0 if mean is None else mean.value(self.at, least=0.0) or 0.0
