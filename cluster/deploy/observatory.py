"""Where the controller brings together what workers and ingress replicas count, for whoever looks at the cluster as a
whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from isotherm.cluster.autoscale.loop import AutoscaleLoop
from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.deploy.fleet import RayFleet
from isotherm.cluster.deploy.ray_metrics import MIRROR_SECONDS, RayMirror
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.operations import OperationLog
from isotherm.cluster.messages.workers import ATTENTION, EXPERT, ROLES, role_of
from isotherm.cluster.observe.metrics import Snapshot, families, render
from isotherm.cluster.observe.reports import Reports
from isotherm.cluster.placement.report import group_rows, heat_ratios

if TYPE_CHECKING:
    from isotherm.cluster.observe.tracing import Traces


class Observed(Protocol):
    """What is looked at: the controller's parts."""

    autoscale: AutoscaleLoop
    operations: OperationLog

    @property
    def fleet(self) -> RayFleet: ...

    @property
    def reconfigurer(self) -> Reconfigurer: ...

    @property
    def restarts(self) -> int: ...

    def not_ready(self) -> str | None: ...


class Observatory:
    def __init__(self, observed: Observed, manifest: Manifest) -> None:
        self._observed = observed
        self._reports = Reports()
        self._lost: Counter[str] = Counter()  # workers, by role
        self._traces: Traces | None = None
        if (endpoint := manifest.tracing.endpoint) is not None:
            from isotherm.cluster.observe import tracing

            self._traces = tracing.Traces("controller", manifest.model_id, tracing.otlp(endpoint))
            self._traces.known(observed.operations.all())

    def operations_changed(self) -> None:
        """An operation has gone on, or ended."""
        if self._traces is not None:
            self._traces.operations(self._observed.operations.all())

    def lost(self, worker: str) -> None:
        self._lost[role_of(worker)] += 1

    def take(self, ingress: str, figures: Figures, requests: JSON | None = None) -> None:
        """What an ingress replica reports."""
        self._reports.take(ingress, figures, requests)

    def requests(self) -> dict[str, JSON]:
        return self._reports.requests()

    def waiting(self) -> JSON:
        """What `isotherm status` says of batches that wait for storage: several replicas may tell of one."""
        told = [batch for replica in self.requests().values() for batch in replica.get("waiting_batches", [])]
        return {"waiting_batches": sorted({batch["id"]: batch for batch in told}.values(), key=lambda b: b["id"])}

    def metrics(self) -> str:
        """What GET /metrics gives."""
        return render(self.snapshot())

    async def mirror(self) -> None:
        """Show Ray what there is, again and again."""
        mirror = RayMirror()
        while True:
            await asyncio.to_thread(mirror.show, families(self.snapshot()))
            await asyncio.sleep(MIRROR_SECONDS)

    def loads(self) -> dict[str, JSON]:
        """Of each worker that has reported lately, the decayed figures that are in the metrics too."""
        o = self._observed
        groups, shards = o.autoscale.loads()
        heat = heat_ratios(self._rows())
        return {shard.name: _of_shard(shard) for shard in shards} | {
            group.name: _of_group(group, heat.get(group.name, 1.0)) for group in groups
        }

    def _rows(self) -> dict[str, float]:
        """Rows per second of each group; nothing before the first placement."""
        placement = self._observed.fleet.placement
        return group_rows(placement, self._observed.autoscale.rates()) if placement.version else {}

    def snapshot(self) -> Snapshot:
        o = self._observed
        placement = o.fleet.placement
        rates_LE = o.autoscale.rates() if placement.version else np.zeros((0, 0))
        groups, shards = o.autoscale.loads()
        desired = o.reconfigurer.desired
        wanted = {ATTENTION: len(desired.shards), EXPERT: len(desired.groups)}
        alive = {ATTENTION: len(o.fleet.alive(o.fleet.shards)), EXPERT: len(o.fleet.alive(o.fleet.groups))}
        return Snapshot(
            groups=groups,
            shards=shards,
            heat={name: 0.0 for name in o.fleet.groups} | self._rows(),
            layers=placement.layers,
            rates_LE=rates_LE,
            placement_version=placement.version,
            decisions=o.autoscale.counts,
            operations=o.operations.ended(),
            operations_open=o.operations.open_count(),
            links=o.fleet.repair.results,
            links_failed=len(o.fleet.repair.failed),
            workers={
                (role, kind): count
                for kind, counts in (("wanted", wanted), ("alive", alive))
                for role, count in counts.items()
            },
            lost=dict.fromkeys(ROLES, 0) | self._lost,
            ready=o.not_ready() is None,
            controller_restarts=o.restarts,
            of_shards=o.autoscale.figures(),
            of_groups=o.autoscale.group_figures(),
            of_ingress=self._reports.figures(),
        )


def _of_shard(shard: ShardLoad) -> JSON:
    return {
        "tokens_per_second": round(shard.tokens_per_second, 3),
        "steps_per_second": round(shard.steps_per_second, 3),
        "first_token_seconds": round(shard.first_token_seconds, 4),
    }


def _of_group(group: GroupLoad, heat: float) -> JSON:
    return {
        "heat": round(heat, 4),
        "busy": round(group.busy, 4),
        "waited": round(group.waited, 4),
        "rows_per_second": round(group.rows_per_second, 3),
        "batch_rows": round(group.batch, 3),
    }
