"""What there is to observe beside a front door that has its engine in its own process: that engine, as one shard."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from isotherm.cluster.autoscale.rates import Meters
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.meters import ShardMeter
from isotherm.cluster.messages.workers import ATTENTION
from isotherm.cluster.observe.metrics import Snapshot, render

SHARD = "local"
_HALF_LIFE = 10.0  # seconds


class Alone:
    """`Others` of cluster/observe/ingress.py without any. Rates are those between scrapes."""

    def __init__(
        self, meter: Callable[[], ShardMeter], ready: Callable[[], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter, self._ready, self._clock = meter, ready, clock
        self._meters = Meters(_HALF_LIFE, silence=float("inf"))

    async def report(self, ingress: str, figures: Figures, requests: JSON) -> None:
        """Nobody needs it."""

    async def requests(self) -> dict[str, JSON]:
        return {}

    async def metrics(self, ingress: str, figures: Figures) -> str:
        meter = self._meter()
        self._meters.observe({SHARD: meter}, {}, self._clock())
        return render(
            Snapshot(
                groups=[],
                shards=self._meters.shards({SHARD: ""}),
                heat={},
                layers=(),
                rates_LE=np.zeros((0, 0)),
                placement_version=0,
                decisions={},
                operations={},
                workers={(ATTENTION, "wanted"): 1, (ATTENTION, "alive"): int(self._ready())},
                ready=self._ready(),
                of_shards={SHARD: meter.figures},
                of_ingress={ingress: figures},
            )
        )
