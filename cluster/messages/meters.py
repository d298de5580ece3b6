"""What workers report of their load. Numbers and times in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isotherm.cluster.messages.figures import Figures


class DecayedMean:
    """The mean of values, of which older ones count less. `lasting`: half-lives after the last value for which there is
    a mean, however many values it is of."""

    def __init__(self, half_life: float, lasting: float = math.inf):
        self.half_life, self.lasting = half_life, lasting
        self._sum = self._weight = self._at = 0.0

    def add(self, value: float, now: float, weight: float = 1.0) -> None:
        keep = self._keep(now)
        self._sum, self._weight, self._at = self._sum * keep + value * weight, self._weight * keep + weight, now

    def value(self, now: float, least: float = 0.05) -> float | None:
        """None where less than `least` of one value's weight is left, and where the last one is too old."""
        if now - self._at > self.lasting * self.half_life:
            return None
        return self._sum / self._weight if self._weight * self._keep(now) > least else None

    def _keep(self, now: float) -> float:
        share: float = 0.5 ** (max(0.0, now - self._at) / self.half_life)
        return share


@dataclass(frozen=True)
class SpeculationMeter:
    """What speculation came to since the start, and what it does now. `tried` and `accepted` by position: a draft
    counts as tried where those before it were right."""

    kind: str
    drafted: int
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    steps: int  # that verified drafts
    gain: float  # expected speed ÷ that without drafts, as decided last
    why: str


@dataclass(frozen=True)
class ShardMeter:
    """An attention shard at one moment. Counts are since its start."""

    running: int
    waiting: int  # requests that hold no KV blocks yet
    capacity: int  # requests that may run at once
    kv_used: float  # fraction of the KV blocks that requests hold
    tokens: int
    steps: int
    # Decayed mean from a request's arrival to its first token; None: no request of late
    first_token_seconds: float | None
    longest_wait: float  # seconds since the arrival of the oldest request that has no token yet; 0: none
    group_wait: Mapping[str, float]  # seconds for which the shard had nothing to do but wait for each group
    rows_routed: np.ndarray  # int64 [layers, experts]
    reads: np.ndarray  # int64 [layers, experts]: steps in which an expert was computed at all
    figures: Figures = ()  # of its steps and its scheduler


@dataclass(frozen=True)
class GroupMeter:
    """An expert group at one moment. Counts are since its start; a row here is a row for one expert."""

    messages: int
    computations: int
    rows: int
    busy_seconds: float
    held_seconds: float
    experts: int
    weight_bytes: int
    figures: Figures = ()  # of what it has loaded
