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
from typing import Any

import ray

from isotherm.cluster.api.access.key_store import KeySource
from isotherm.cluster.autoscale.loop import AutoscaleLoop
from isotherm.cluster.background import Background
from isotherm.cluster.control.ingress_watch import IngressWatch
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.control.saved_state import SavedState, decode
from isotherm.cluster.control.startup import start_again_and_again
from isotherm.cluster.deploy.feed import ClusterFeed
from isotherm.cluster.deploy.fleet import RayFleet, fence
from isotherm.cluster.deploy.observatory import Observatory
from isotherm.cluster.deploy.revision import Revision
from isotherm.cluster.deploy.revisions import Revisions, made_again
from isotherm.cluster.deploy.roll_check import open_checkpoint
from isotherm.cluster.deploy.rolled_values import with_workers_of
from isotherm.cluster.deploy.standing import end_if_superseded, watch_standing
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.logs import set_up_logs
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.feed import FeedPart
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.membership import UNCHANGED_SECONDS, Membership, ShardLimits
from isotherm.cluster.messages.operations import OperationError, OperationLog, parse_mode, parse_operation
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.on_ray.ingress_replica import IngressReplica
from isotherm.cluster.on_ray.state_store import StateStore
from isotherm.cluster.placement.report import experts_report

log = logging.getLogger(__name__)
LEAVE_SECONDS = 5.0  # in which a start that is ended gives its places back


@dataclass(frozen=True)
class Owner:
    """The process that serves: it ends when the controller is told to stop."""

    host: str
    pid: int


class Controller:
    async def __init__(  # type: ignore[misc]
        self,
        cluster_id: str,
        manifest: Manifest,
        model_path: str,
        keys: KeySource | None,
        owner: Owner | None,
        dashboard: str | None,
    ):
        """Ray awaits it, at each start anew with the same arguments; no other call comes before it is done.
        `cluster_id` is this cluster's alone. `dashboard`: where `ray job submit` goes, as the driver knows it; in an
        actor Ray may name another cluster's port."""
        set_up_logs("controller", manifest.logging.format, manifest.logging.level)
        self._keys, self._owner, self._dashboard = keys, owner, dashboard
        self.started = time.time()
        self._store = StateStore(cluster_id)
        self._cluster_id, generation = cluster_id, self._store.claim()
        saved = await self._saved()
        self._front_door = manifest if saved is None else Manifest.model_validate_json(saved.manifest)
        self.operations = OperationLog() if saved is None else OperationLog.load(saved.operations, time.time())
        if saved is None:
            first = self._revision(0, manifest, open_checkpoint(manifest, model_path))
        else:
            first = made_again(saved.serving, self._revision)
        self.revisions = Revisions(
            lambda: self.manifest, model_path, first, self.operations,
            make=self._revision, save=self._save, changed=self._publish, swapped=self._swapped,
        )  # fmt: skip
        self.config = first.checkpoint.config  # of every revision
        load = "" if saved is None else saved.autoscaler
        self.autoscale = AutoscaleLoop(
            first.manifest, self.config, self.fleet, self.reconfigurer, self.operations,
            decided=self._try_save, saved=load,
        )  # fmt: skip
        self.fleet.load_view = self.autoscale.load_view
        self.observatory = Observatory(self, manifest)
        self._feed = ClusterFeed(
            self.revisions, self.autoscale, self.status, self._operations_told, lambda: self.reconfigurer.pinned()
        )
        self._phase = "starting workers"  # "serving" once every worker has come up
        # Versions grow over restarts too: an ingress replica takes this one's word for newer than what it knows.
        self._membership = Membership(generation << 32, (), self._phase, first.limits)
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._asked_to_end = asyncio.Event()
        self._ending = False
        self._starting: asyncio.Task[None] | None = None
        self._background = Background()
        self._ingress_watch = IngressWatch(self._background, IngressReplica, manifest.liveness.timeout)
        standing = lambda: watch_standing(self._store, self._stopped.is_set)  # noqa: E731
        self._background.keep("the watch over this controller's standing", standing)
        if saved is not None:
            await self._resume(saved)

    async def _saved(self) -> SavedState | None:
        """What the controller before this one has left. It may still run: when the workers refuse its orders it commits
        nothing more, and what is written then is what holds."""
        if (written := self._store.read()) is None:
            return None
        before = decode(written)
        gone = () if before.leaving is None else before.leaving.workers
        await fence(self._store.generation, [*before.serving.workers, *gone])
        written = self._store.read()
        return None if written is None else decode(written)

    def _revision(self, number: int, manifest: Manifest, checkpoint: Checkpoint) -> Revision:
        died = lambda worker: self._died(number, worker)  # noqa: E731
        standing = lambda: end_if_superseded(self._store)  # noqa: E731
        generation, publish = self._store.generation, self._publish
        fleet = RayFleet(self._cluster_id, generation, manifest, checkpoint, died, publish, standing)
        return Revision(number, manifest, checkpoint, fleet, self.operations, self._log_changed, self._save)

    @property
    def manifest(self) -> Manifest:
        """What the cluster has now: its front door and its workers are changed each by themselves."""
        return with_workers_of(self._front_door, self.revisions.serving.manifest)

    @property
    def fleet(self) -> RayFleet:
        return self.revisions.serving.fleet

    @property
    def reconfigurer(self) -> Reconfigurer:
        return self.revisions.serving.reconfigurer

    def _swapped(self) -> None:
        self.autoscale.follow(self.revisions.serving.manifest, self.fleet, self.reconfigurer)
        self._publish()

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
            await start_again_and_again(self._start_fleet, self._set_phase, self._owner is None, self.fleet.is_loss)

    async def _start_fleet(self) -> None:
        """Start what the manifest says, and publish placement version 1."""
        m, c, planner = self.manifest, self.config, self.reconfigurer.planner
        planned = planner.first(m.attention.shards, m.experts.groups, c.moe_layers, c.n_routed_experts)
        self._save()
        await self.revisions.serving.start(planned, self._set_phase)
        self._save()
        self.fleet.committed(planned)
        self._serve()
        log.info("serving with %d attention shards and %d expert groups", len(planned.shards), len(planned.groups))
        if not self.fleet.all_alive():  # one that has died since its links were made, which failed nothing
            self.reconfigurer.heal()

    async def _resume(self, saved: SavedState) -> None:
        """Take over from a controller that has died."""
        restarts, version = self._store.generation, saved.serving.desired.placement.version
        log.warning("restarted, %d times now; placement version %d was committed last", restarts, version)
        if await self.revisions.resume(saved):
            self._save()
            self._serve()
        else:
            await self.begin()  # once more, from the beginning

    def _serve(self) -> None:
        """From now on requests, operations and deaths are taken."""
        self._set_phase("serving")
        self._background.keep("the autoscaler", self.autoscale.run)
        self._background.keep("the metrics in Ray", self.observatory.mirror)

    def _save(self) -> None:
        """Raises what Ray raises when its head cannot be reached, RuntimeError when the cluster ends, SupersededError
        for a controller that is not the newest."""
        if self._stopped.is_set():
            raise RuntimeError("the cluster is being ended")
        logs = self.operations.dump(), self.autoscale.dump()
        state = SavedState(*self.revisions.saved(), *logs, self._front_door.model_dump_json())
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

    def _died(self, revision: int, worker: str) -> None:
        self.observatory.lost(worker)
        if self._stopped.is_set() or (self._phase == "serving" and self.revisions.died(revision)):
            return
        log.error("%s died while it was started with others", worker)

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
            self.revisions.serving.limits,
            recovering,
            self.fleet.numerics.system_fingerprint,
            self.revisions.serving.number,
            self.revisions.shards_of_others(),
        )
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, known_version: int) -> Membership:
        """The membership as soon as it is newer than `known_version`, or after UNCHANGED_SECONDS the same again."""
        if self._membership.version <= known_version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), UNCHANGED_SECONDS)
        return self._membership

    async def answer(self) -> None:
        """A sign of life."""

    async def url(self) -> str:
        """Where the ingress listens, as seen from its own node."""
        return self.manifest.url

    async def status(self) -> JSON:
        """What `isotherm status --json` prints."""
        running = self.operations.under_way()
        return {
            "controller": {
                "pid": os.getpid(),
                "uptime_seconds": round(time.time() - self.started, 1),
                "restarts": self._store.generation,
                "phase": self.not_ready() or "serving",
            },
            "model": {
                "id": self.manifest.model_id,
                "path": str(self.revisions.serving.checkpoint.path),
                "revision": self.revisions.serving.number,
                "max_model_len": self._membership.limits.max_model_len,
            },
            "url": await self.url(),
            "dashboard": self._dashboard,
            "operation": None if running is None else self.revisions.told(running),
            "autoscaler": self.autoscale.summary(),
            **await self.revisions.status(self.observatory.loads()) | self.observatory.waiting(),
        }

    async def operate(self, body: Any) -> JSON:
        """Take an operation (POST /admin/operations). Raises OperationError or PlacementChangeError."""
        request = parse_operation(body)
        nodes = await asyncio.to_thread(ray.nodes) if request.target.drain_nodes else []
        if self._phase != "serving":
            raise OperationError(f"the cluster does not serve yet: {self._phase}", conflict=True)
        known = {node["NodeID"] for node in nodes} | self.reconfigurer.desired.drained
        for node in request.target.drain_nodes or []:
            if node not in known:
                raise OperationError(
                    f"drain_nodes: there is no node {node}; those there are: {', '.join(sorted(known))}", "drain_nodes"
                )
        rolls = request.target.rolls
        return self.revisions.told(await self.revisions.submit(request) if rolls else self.reconfigurer.submit(request))

    async def operation(self, operation_id: str) -> JSON | None:
        found = self.operations.get(operation_id)
        return None if found is None else self.revisions.told(found)

    async def operation_history(self) -> list[JSON]:
        return self._operations_told()

    def _operations_told(self) -> list[JSON]:
        return [self.revisions.told(o) for o in self.operations.all()]

    async def experts(self) -> JSON:
        """What GET /admin/experts gives."""
        placement, groups = self.fleet.placement, list(self.fleet.groups)
        rows = list((await self.fleet.rows_routed()).values())
        return experts_report(placement, groups, rows, self.autoscale.rates())

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
        self._ingress_watch.follow(ingress)

    async def killed_ingress(self) -> list[str]:
        return self._ingress_watch.killed

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
            await asyncio.wait([self._starting], timeout=LEAVE_SECONDS)  # whoever asks kills this process then
        await self.revisions.stop()
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

    async def served(self) -> tuple[Manifest, Manifest]:
        return self.manifest, self.revisions.as_operated()  # what it has; and as operations have made that

    async def front_door(self) -> tuple[Manifest, KeySource | None]:
        """What the ingress is built with."""
        return self.manifest, self._keys

    async def take_front_door(self, manifest: Manifest) -> None:
        """The ingress has been built anew."""
        self._front_door = manifest
        self._save()

    async def what_serves(self) -> tuple[str, ShardLimits]:
        """The directory of the model that serves, and what its shards take."""
        return str(self.revisions.serving.checkpoint.path), self.revisions.serving.limits

    async def wait_stopped(self) -> None:
        await self._asked_to_end.wait()
