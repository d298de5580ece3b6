"""The controller: one detached actor that starts the fleet, publishes membership, takes operations and heals. Outside
the token path.

When it dies Ray starts it again: it reads what the one before it wrote down, finds the workers, which went on
meanwhile, and takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from isotherm.cluster.autoscale.loop import AutoscaleLoop
from isotherm.cluster.background import Background
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.control.saved_state import SavedState, decode
from isotherm.cluster.control.startup import start_again_and_again, start_fleet
from isotherm.cluster.deploy.feed import ClusterFeed
from isotherm.cluster.deploy.fleet import RayFleet
from isotherm.cluster.deploy.observatory import Observatory
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.logs import set_up_logs
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.feed import FeedPart
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.membership import Membership, SupersededError
from isotherm.cluster.messages.operations import Operation, OperationError, OperationLog, parse_mode, parse_operation
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.on_ray.state_store import StateStore
from isotherm.cluster.placement.report import experts_report
from isotherm.cluster.placement.table import Placement, contiguous_placement

log = logging.getLogger(__name__)
STANDING_PERIOD = 5.0  # seconds between looks whether this is still the newest controller


@dataclass(frozen=True)
class Owner:
    """The process that serves: it ends when the controller is told to stop."""

    host: str
    pid: int


class Controller:
    async def __init__(  # type: ignore[misc]
        self, cluster_id: str, manifest: Manifest, model_path: str, owner: Owner | None, dashboard: str | None
    ):
        """Ray awaits it, at each start anew with the same arguments; no other call comes before it is done.
        `cluster_id` is this cluster's alone. `dashboard`: where `ray job submit` goes, as the driver knows it; in an
        actor Ray may name another cluster's port."""
        set_up_logs("controller", manifest.logging.format, manifest.logging.level)
        self.manifest = manifest
        self._owner, self._dashboard = owner, dashboard
        self.checkpoint, self.speculation = Checkpoint.open(Path(model_path)).drafting(manifest.speculation.kind)
        self.config = self.checkpoint.config
        self.started = time.time()
        self._store = StateStore(cluster_id)
        generation = self._store.claim()
        self.fleet = RayFleet(
            cluster_id, generation, manifest, self.checkpoint, self._died, self._publish, self._standing
        )
        if (written := self._store.read()) is not None:
            # The one before may still run. When the workers refuse its orders it commits nothing more: what is written
            # then is what holds.
            before = decode(written)
            await self.fleet.fence([*before.groups, *before.shards])
            written = self._store.read()
        saved = None if written is None else decode(written)
        self.operations = OperationLog() if saved is None else OperationLog.load(saved.operations, time.time())
        self.reconfigurer = Reconfigurer(self.fleet, self.operations, self._log_changed, self._save)
        self.autoscale = AutoscaleLoop(
            manifest,
            self.config,
            self.fleet,
            self.reconfigurer,
            self.operations,
            decided=self._try_save,
            saved="" if saved is None else saved.autoscaler,
        )
        self.fleet.load_view = self.autoscale.load_view
        self.observatory = Observatory(self, manifest)
        self._feed = ClusterFeed(
            self.fleet, self.autoscale, self.status, self._operations_told, self.reconfigurer.pinned
        )
        self._phase = "starting workers"  # "serving" once every worker has come up
        # Versions grow over restarts too, so that an ingress replica takes this one's word for newer than what it
        # knows.
        self._membership = Membership(
            generation << 32, (), self._phase, manifest.scheduler_config(self.config).max_model_len
        )
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._asked_to_end = asyncio.Event()
        self._ending = False
        self._starting: asyncio.Task[None] | None = None
        self._background = Background()
        self._background.keep("the watch over this controller's standing", self._watch_standing)
        if saved is not None:
            await self._resume(saved)

    # --- starting ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every worker of the manifest, once, and wait until they serve. Raises what went wrong."""
        await self.begin()
        assert self._starting is not None
        await asyncio.shield(self._starting)

    async def begin(self) -> None:
        """`start` in the background, for callers that do not stay. A failure shows as the phase, in `status` and GET
        /ready; where nobody waits for `start`, it is tried again."""
        if self._starting is None:
            self._starting = self._background.spawn("the start of the cluster", self._start())

    async def _start(self) -> None:
        if self._phase != "serving":  # as the controller before this one has left it
            await start_again_and_again(self._start_fleet, self._set_phase, retry=self._owner is None)

    async def _start_fleet(self) -> None:
        """Start what the manifest says, and publish placement version 1."""
        m, fleet, planner = self.manifest, self.fleet, self.reconfigurer.planner
        shards = planner.new_names("attention", m.attention.shards)
        groups = planner.new_names("expert", m.experts.groups) if self.config.moe_layers else ()
        self._save()
        layers, experts = self.config.moe_layers, self.config.n_routed_experts
        placement = contiguous_placement(layers, experts, groups) if groups else Placement(1, (), ())
        await start_fleet(fleet, shards, groups, placement, self._set_phase)
        self.reconfigurer.desired = Desired(groups, shards, placement)
        self._save()
        fleet.committed(placement)
        self._serve()
        log.info("serving with %d attention shards and %d expert groups", len(shards), len(groups))

    async def _resume(self, saved: SavedState) -> None:
        """Take over from a controller that has died."""
        log.warning(
            "restarted, %d times now; placement version %d was committed last",
            self._store.generation,
            saved.placement.version,
        )
        fleet = self.fleet
        strays = fleet.find(saved.groups, saved.shards)
        self.reconfigurer.planner.numbers.update(saved.numbers)
        self.reconfigurer.planner.use_names(strays)
        if not saved.placement.version:  # it died while it started the cluster: once more, from the beginning
            for worker in strays:
                await fleet.end(worker)
            await self.begin()
            return
        fleet.placement = saved.placement
        fleet.numerics.restore(saved.numerics)
        fleet.in_service = set(fleet.alive(saved.shards))
        desired = Desired(
            saved.groups, saved.shards, saved.placement, frozenset(saved.drained_nodes), frozenset(saved.pinned)
        )
        self._background.spawn("taking over the workers", self.reconfigurer.take_over(desired))
        self.reconfigurer.desired = desired
        self._save()
        self._serve()

    def _serve(self) -> None:
        """From now on requests, operations and deaths are taken."""
        self._set_phase("serving")
        self._background.keep("the autoscaler", self.autoscale.run)
        self._background.keep("the metrics in Ray", self.observatory.mirror)

    def _standing(self) -> None:
        """Ends this process where a newer controller has been started: it was taken for dead and is not, and must not
        act."""
        try:
            self._store.check()
        except SupersededError as error:
            log.error("%s; this one ends", error)
            os._exit(1)

    async def _watch_standing(self) -> None:
        while not self._stopped.is_set():
            await asyncio.sleep(STANDING_PERIOD)
            try:
                await asyncio.to_thread(self._standing)
            except Exception as error:  # Ray's head is away
                log.warning("cannot see whether there is a newer controller: %s", error)

    def _save(self) -> None:
        """Raises what Ray raises when its head cannot be reached, RuntimeError when the cluster ends, SupersededError
        for a controller that is not the newest."""
        if self._stopped.is_set():
            raise RuntimeError("the cluster is being ended")
        desired, numbers = self.reconfigurer.desired, self.reconfigurer.planner.numbers
        drained, pinned = tuple(sorted(desired.drained)), tuple(sorted(desired.pinned))
        logs = self.operations.dump(), self.autoscale.dump(), self.fleet.numerics.dump()
        state = SavedState(desired.groups, desired.shards, desired.placement, drained, pinned, numbers, *logs)
        self._store.write(state.encode())

    def _try_save(self) -> None:
        try:
            self._save()
        except Exception:  # the history may then lack this; what is committed is saved by whoever commits it
            log.exception("could not save the history of operations and decisions")

    def _log_changed(self) -> None:
        self._try_save()
        self.observatory.operations_changed()
        self._publish()
        self._feed.tell()

    # --- what ingress replicas and commands see ---------------------------------------------------

    def _died(self, worker: str) -> None:
        self.observatory.lost(worker)
        if self._phase == "serving" and not self._stopped.is_set():
            self.reconfigurer.heal()
        elif not self._stopped.is_set():
            log.error("%s died while the cluster was started: %s", worker, self.fleet.dead[worker])

    def _set_phase(self, phase: str) -> None:
        self._phase = phase
        self._publish()

    @property
    def restarts(self) -> int:
        return self._store.generation

    def not_ready(self) -> str | None:
        """Why requests cannot be served; what waits or is replaced while others serve does not count."""
        if self._phase != "serving":
            return "; ".join([self._phase, *self.fleet.waits.values()])
        shards, why = self.fleet.reachable()
        return None if shards else why or "no attention shard is left; it is being replaced"

    def _publish(self) -> None:
        before = self._membership
        shards = tuple(self.fleet.reachable()[0])
        recovering = self._phase == "serving" and not shards
        self._membership = Membership(
            before.version + 1,
            shards,
            self.not_ready(),
            before.max_model_len,
            recovering,
            self.fleet.numerics.system_fingerprint,
        )
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, known_version: int) -> Membership:
        """The membership as soon as it is newer than `known_version`; after 30 s without a change, the same again."""
        if self._membership.version <= known_version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 30.0)
        return self._membership

    async def answer(self) -> None:
        """A sign of life."""

    async def url(self) -> str:
        """Where the ingress listens, as seen from its own node."""
        return self.manifest.url

    async def status(self) -> JSON:
        """What `isotherm status --json` prints."""
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        loads = self.observatory.loads()
        running, drained = self.operations.running() or self.operations.waiting(), self.reconfigurer.desired.drained
        return {
            "controller": {
                "pid": os.getpid(),
                "uptime_seconds": round(time.time() - self.started, 1),
                "restarts": self._store.generation,
                "phase": self.not_ready() or "serving",
            },
            "model": {
                "id": self.manifest.model_id,
                "path": str(self.checkpoint.path),
                "max_model_len": self._membership.max_model_len,
            },
            "url": await self.url(),
            "dashboard": self._dashboard,
            "placement_version": self.fleet.placement.version or None,
            "numerics": self.fleet.numerics.as_dict(),
            "operation": None if running is None else self._told(running),
            "autoscaler": self.autoscale.summary(),
            "workers": [worker | {"load": loads.get(worker["id"])} for worker in await self.fleet.statuses()],
            "nodes": [
                {"id": i, "address": n["NodeManagerAddress"], "alive": n["Alive"], "drained": i in drained}
                for i, n in nodes.items()
            ],
        }

    async def operate(self, body: Any) -> JSON:
        """Take an operation (POST /admin/operations). Raises OperationError or PlacementChangeError."""
        request = parse_operation(body)
        if self._phase != "serving":
            raise OperationError(f"the cluster does not serve yet: {self._phase}", conflict=True)
        known = {node["NodeID"] for node in ray.nodes()} | self.reconfigurer.desired.drained
        for node in request.target.drain_nodes or []:
            if node not in known:
                raise OperationError(
                    f"drain_nodes: there is no node {node}; those there are: {', '.join(sorted(known))}", "drain_nodes"
                )
        return self._told(self.reconfigurer.submit(request))

    async def operation(self, operation_id: str) -> JSON | None:
        found = self.operations.get(operation_id)
        return None if found is None else self._told(found)

    async def operation_history(self) -> list[JSON]:
        return self._operations_told()

    def _operations_told(self) -> list[JSON]:
        return [self._told(o) for o in self.operations.all()]

    def _told(self, operation: Operation) -> JSON:
        """`waiting`: what it waits for, in words; tokens go on meanwhile."""
        waits = (
            []
            if operation.phase.is_final
            else [words for worker, words in self.fleet.waits.items() if f"start {worker}" in operation.plan]
        )
        return operation.as_dict() | {"waiting": waits}

    async def experts(self) -> JSON:
        """What GET /admin/experts gives."""
        return experts_report(
            self.fleet.placement,
            list(self.fleet.groups),
            list((await self.fleet.rows_routed()).values()),
            self.autoscale.rates(),
        )

    async def autoscaler(self) -> JSON:
        """What GET /admin/autoscaler gives."""
        return self.autoscale.report()

    async def set_autoscaler(self, body: Any) -> JSON:
        """Change the autoscaler's mode (POST /admin/autoscaler). Raises OperationError."""
        self.autoscale.set_mode(parse_mode(body))
        self._feed.tell()
        return self.autoscale.report()

    async def feed_part(self, last: str) -> FeedPart | None:
        """The event stream from the part whose id is `last`, as ClusterFeed.part says."""
        return await self._feed.part(last)

    async def report(self, ingress: str, figures: Figures, requests: JSON) -> None:
        """Take what an ingress replica has counted, and its requests."""
        self.observatory.take(ingress, figures, requests)

    async def requests(self) -> dict[str, JSON]:
        return self.observatory.requests()

    async def metrics(self, ingress: str, figures: Figures) -> str:
        """What GET /metrics of an ingress replica gives, which has counted `figures` by now."""
        self.observatory.take(ingress, figures)
        return self.observatory.metrics()

    # --- ending -----------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End every worker and wake whoever waits in `wait_stopped`."""
        self._stopped.set()
        self._asked_to_end.set()
        self._set_phase("stopping")
        if self._starting is not None:
            self._starting.cancel()
        await self.reconfigurer.interrupt("the cluster is being ended")
        await self.fleet.end_all()
        self._store.clear()

    async def ask_to_end(self) -> None:
        """Wake whoever waits in `wait_stopped`: the process that serves, which drains the ingress and then calls
        `stop`."""
        self._asked_to_end.set()

    async def take_up_end(self) -> None:
        """The process that serves has heard of `ask_to_end` and does what is to be done."""
        self._ending = True

    async def ending(self) -> bool:
        return self._ending

    async def owner(self) -> Owner | None:
        return self._owner

    async def served(self) -> Manifest:
        return self.manifest

    async def wait_stopped(self) -> None:
        await self._asked_to_end.wait()
