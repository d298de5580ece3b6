"""The traffic of the last minutes, made of what workers report now and then: figures of the whole cluster over time,
and rows per second from each shard to each group. Pure: numbers and times in, numbers out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.placement.table import Placement

KEPT_SECONDS = 300.0
KEPT_SAMPLES = 300


class Traffic:
    """`samples`: newest last, each with its number `n` and `time` in seconds since the epoch. `flows`: rows per second
    by shard and group, between the last two reports. `rows_LE`: rows since the start, int64 [layers, experts]; None
    before the first report."""

    def __init__(self) -> None:
        self.samples: deque[JSON] = deque(maxlen=KEPT_SAMPLES)
        self.flows: dict[str, dict[str, float]] = {}
        self.rows_LE: np.ndarray | None = None
        self._count = 0
        self._at: float | None = None
        self._shards: dict[str, ShardMeter] = {}
        self._groups: dict[str, GroupMeter] = {}
        self._shares: tuple[Placement, _Shares] | None = None

    def observe(
        self,
        shards: Mapping[str, ShardMeter],
        groups: Mapping[str, GroupMeter],
        placement: Placement,
        now: float,
        time_of_day: float,
    ) -> None:
        """`now`: seconds of any one clock. What a worker counted before it is known counts for nothing."""
        seconds = 0.0 if self._at is None else now - self._at
        if seconds > 0:
            self._sample(shards, groups, seconds, time_of_day)
            self.flows = self._flows(shards, placement, seconds)
        self._at, self._shards, self._groups = now, dict(shards), dict(groups)
        counts = [shard.rows_routed for shard in shards.values()]
        if counts and all(count.shape == counts[0].shape for count in counts):
            self.rows_LE = np.sum(counts, axis=0)

    def _sample(
        self, shards: Mapping[str, ShardMeter], groups: Mapping[str, GroupMeter], seconds: float, time_of_day: float
    ) -> None:
        tokens = sum(max(0, m.tokens - self._shards[n].tokens) for n, m in shards.items() if n in self._shards)
        steps = sum(max(0, m.steps - self._shards[n].steps) for n, m in shards.items() if n in self._shards)
        known = [(m, self._groups[n]) for n, m in groups.items() if n in self._groups]
        busy = [min(1.0, max(0.0, m.busy_seconds - old.busy_seconds) / seconds) for m, old in known]
        rows = sum(max(0, m.rows - old.rows) for m, old in known)
        firsts = [max(m.first_token_seconds or 0.0, m.longest_wait) for m in shards.values()]
        self._count += 1
        sample: JSON = {
            "n": self._count,
            "time": round(time_of_day, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "steps_per_second": round(steps / seconds, 1),
            "rows_per_second": round(rows / seconds, 1),
            "running": sum(m.running for m in shards.values()),
            "waiting": sum(m.waiting for m in shards.values()),
            "kv_used": round(sum(m.kv_used for m in shards.values()) / max(1, len(shards)), 4),
            "first_token_seconds": round(max(firsts, default=0.0), 4),
            "busy": round(sum(busy) / max(1, len(busy)), 4),
        }
        self.samples.append(sample)
        while self.samples[0]["time"] < time_of_day - KEPT_SECONDS:
            self.samples.popleft()

    def _flows(
        self, shards: Mapping[str, ShardMeter], placement: Placement, seconds: float
    ) -> dict[str, dict[str, float]]:
        if self._shares is None or self._shares[0] is not placement:
            self._shares = placement, _Shares(placement)
        shares, flows = self._shares[1], {}
        for name, shard in shards.items():
            before = self._shards.get(name)
            if before is not None and before.rows_routed.shape == shard.rows_routed.shape:
                rows_LE = np.maximum(shard.rows_routed - before.rows_routed, 0)
                flows[name] = {g: round(rows / seconds, 1) for g, rows in shares.of(rows_LE).items() if rows}
        return flows


class _Shares:
    """Which part of an expert's rows each group has: even parts of those that hold it."""

    def __init__(self, placement: Placement) -> None:
        self.groups = placement.groups()
        number = {group: i for i, group in enumerate(self.groups)}
        self._shape = placement.shape
        held = [
            (layer * self._shape[1] + expert, number[group], 1.0 / len(holders))
            for layer, experts in enumerate(placement.holders)
            for expert, holders in enumerate(experts)
            for group in holders
        ]
        self._pairs = np.array([pair for pair, _, _ in held], dtype=np.int64)
        self._numbers = np.array([group for _, group, _ in held], dtype=np.int64)
        self._parts = np.array([part for _, _, part in held])

    def of(self, rows_LE: np.ndarray) -> dict[str, float]:
        if rows_LE.shape != self._shape or not len(self._pairs):
            return {}
        rows = np.bincount(self._numbers, rows_LE.reshape(-1)[self._pairs] * self._parts, len(self.groups))
        return dict(zip(self.groups, rows.tolist(), strict=True))
