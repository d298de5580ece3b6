"""The workers of a cluster: started, linked, given experts and placements, watched, ended. Acts; what is to be done is
decided elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray.exceptions import RayError

from isotherm.cluster.background import Background
from isotherm.cluster.control.copy_offers import copy_offers
from isotherm.cluster.control.link_choice import choose_link
from isotherm.cluster.control.link_repair import RELINK_SECONDS, LinkRepair
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.spares import Spares
from isotherm.cluster.control.worker_watch import WorkerWatch
from isotherm.cluster.deploy.hosted import AttentionShard, ExpertGroup
from isotherm.cluster.deploy.meeting_point import MeetingPoint
from isotherm.cluster.deploy.places import Places
from isotherm.cluster.deploy.worker_reports import ANSWER_SECONDS, WorkerReports
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.copies import CopySource, Pair
from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.messages.workers import ATTENTION, EXPERT, Meeting, WorkerSpec, role_of
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.fingerprint import ClusterNumerics
from isotherm.cluster.on_ray.handles import ActorHandle, Reference
from isotherm.cluster.on_ray.spare_process import start_spare
from isotherm.cluster.on_ray.workers import RayWorker, end_worker, find_worker, find_workers, is_loss, start_worker
from isotherm.cluster.placement.copy_sources import copy_sources
from isotherm.cluster.placement.table import Placement

log = logging.getLogger(__name__)
MEETING_TIMEOUT = 60.0  # seconds in which both ends of a new link must come together
DRAIN_GRACE = 60.0  # seconds beyond its time that a shard may take to give its requests back


async def fence(generation: int, workers: Iterable[str]) -> None:
    """When it returns, none of the named workers takes orders of a controller older than this generation; who is gone,
    or hangs, is left out."""

    async def tell(name: str) -> None:
        with contextlib.suppress(ValueError, RayError, asyncio.TimeoutError):  # ValueError: Ray knows no such actor
            worker = await asyncio.to_thread(find_worker, name)
            await asyncio.wait_for(worker.order.remote(generation, "pid"), ANSWER_SECONDS)

    await asyncio.gather(*map(tell, workers))


class RayFleet:
    """`Fleet` of cluster/control/fleet.py over Ray actors. `cluster_id` tells this cluster's placement groups from
    others. `died` is told a worker's name; `changed` that the shards in service or the waits have changed. Workers
    refuse the orders of a `generation` older than another's that they have heard of; `standing` is called before
    workers are started or killed, which cannot refuse it, and returns only for the newest."""

    def __init__(
        self,
        cluster_id: str,
        generation: int,
        manifest: Manifest,
        checkpoint: Checkpoint,
        died: Callable[[str], None],
        changed: Callable[[], None],
        standing: Callable[[], None],
    ):
        self.manifest, self.checkpoint, self.generation = manifest, checkpoint, generation
        self.places = Places(f"isotherm-{cluster_id}:", manifest, changed, standing)
        self.waits = self.places.waits
        self.numerics = ClusterNumerics(manifest.mixed)
        self.placement = Placement(0, (), ())
        self.groups: dict[str, RayWorker] = {}
        self.shards: dict[str, RayWorker] = {}
        self.dead: dict[str, str] = {}  # worker → what Ray said, or how it was found to hang
        self._reports = WorkerReports(self.dead)
        self._members: frozenset[str] = frozenset()  # groups that were committed
        self.in_service: set[str] = set()  # shards
        self.avoid: frozenset[str] = frozenset()  # nodes on which nothing is started
        self.load_view: Callable[[], list[list[float]] | None] = lambda: None
        self._died, self._changed, self._standing = died, changed, standing
        self.scheduler_config = manifest.scheduler_config(checkpoint.config)
        self._ending: set[str] = set()  # workers of which a part may be gone: processes, or their places
        self._loading: set[str] = set()  # workers that load, and may be too busy to answer
        self._background = Background()
        self.repair = LinkRepair(self, lambda worker, reason: self._lost(worker, reason, unreachable=True), changed)
        self._watch = WorkerWatch(
            manifest.liveness.timeout, busy=self._loading.__contains__, lost=self._lost,
            links_failed=self.repair.report, patience=manifest.link_timeout,
        )  # fmt: skip
        self._spares = Spares(start_spare) if manifest.liveness.spare_processes else None
        self._meeting_point = MeetingPoint()

    def group_names(self) -> list[str]:
        return list(self.groups)

    def shard_names(self) -> list[str]:
        return list(self.shards)

    def alive(self, workers: Iterable[str]) -> list[str]:
        return [w for w in workers if w not in self.dead]

    def node_of(self, worker: str) -> str | None:
        found = self.groups.get(worker) or self.shards.get(worker)
        return None if found is None else found.node_id

    def expert_load(self) -> list[list[float]] | None:
        return self.load_view()

    def slots(self, groups: int) -> int:
        return self.manifest.group_slots(self.placement.experts, groups)

    def _order(self, worker: ActorHandle, name: str, *args: Any) -> Reference:
        return worker.order.remote(self.generation, name, *args)

    # --- starting and ending ----------------------------------------------------------------------

    is_loss = staticmethod(is_loss)

    async def start_group(self, name: str) -> None:
        """Started without experts; there are slot numbers for all of them, and memory is taken as they are loaded."""
        config, section = self.checkpoint.config, self.manifest.experts
        slot = await self.places.take(name, self.avoid)
        others = [self.groups[g].node_id for g in self.alive(self.groups)] + self.places.nodes_of_groups()
        spec = self._spec(name, section.threads, section.gpus, others.count(slot.node_id) + 1)
        resources, slots = self.places.resources(name), len(config.moe_layers) * config.n_routed_experts
        with self._reports.starting(name):
            worker = start_worker(name, slot, resources, ExpertGroup, spec, slot.host, slots)
            self.groups[name] = worker
            await self._order(worker.actor, "pid")
            self._started_on(slot.node_id)
            fingerprint = await worker.call("fingerprint")
        self.numerics.admit(name, fingerprint)
        self._watch.add(worker, has_links=False)

    def find(self, desired: Desired) -> list[str]:
        """Take over the workers of `desired`, which a controller before this one has committed, as they are. Those that
        are gone count as dead. Gives the names of workers found that are not among them."""
        found = find_workers(self.places.prefix)
        wanted = {**dict.fromkeys(desired.groups, self.groups), **dict.fromkeys(desired.shards, self.shards)}
        for name, workers in wanted.items():
            workers[name] = found.get(name) or RayWorker(name, None, None)
            if name in found:
                self._watch.add(found[name], has_links=name in self.shards)
                self._started_on(found[name].node_id)
            else:
                self.dead[name] = "it was gone when the controller came back"
        self._enter_service(desired)
        return [name for name in found if name not in wanted]

    def take_in(self, strays: Iterable[str]) -> None:
        """Workers that nobody knows of, to be ended like any other."""
        found = find_workers(self.places.prefix)
        for worker in (found[name] for name in strays if name in found):
            (self.groups if role_of(worker.id) == EXPERT else self.shards)[worker.id] = worker
            self._watch.add(worker, has_links=worker.id in self.shards)

    async def start_shard(self, name: str) -> None:
        section = self.manifest.attention
        slot = await self.places.take(name, self.avoid)
        spec = self._spec(name, section.threads, section.gpus)
        resources = self.places.resources(name)
        with self._reports.starting(name):
            worker = start_worker(name, slot, resources, AttentionShard, spec, slot.host, self.scheduler_config)
            self.shards[name] = worker
            await self._order(worker.actor, "pid")
            self._started_on(slot.node_id)
            fingerprint = await worker.call("fingerprint")
        self.numerics.admit(name, fingerprint)
        with self._load_of(name):
            await self._order(worker.actor, "load")
        self._watch.add(worker, has_links=True)

    def _started_on(self, node: str | None) -> None:
        if self._spares is not None and node is not None:
            self._spares.used(node)

    async def reserve(self, worker: str, avoid: frozenset[str]) -> None:
        await self.places.reserve(worker, avoid)

    def release(self, worker: str) -> None:
        self.places.release(worker)

    def _spec(self, name: str, threads: int | None, gpus: float, sharers: int = 1) -> WorkerSpec:
        m = self.manifest
        device, links = m.worker_device(gpus), m.links
        return WorkerSpec(
            id=name,
            model_path=self.checkpoint.path,
            device=device,
            dtype=m.dtype,
            kv_cache_dtype=m.engine.kv_cache_dtype,
            weights=m.weights.choice,
            kernels=m.kernels,
            isa=m.isa,
            threads=threads,
            link_timeout=m.link_timeout,
            gather_window=links.gather_window,
            speculation=m.speculation.kind,
            draft_tokens=m.speculation.tokens,
            copy_from=m.experts.copy_from,
            sharers=sharers,
            log_format=m.logging.format,
            log_level=m.logging.level,
        )

    async def end(self, name: str) -> None:
        """Where it raises, the worker is still known, and may be ended again; that its process is gone by then is no
        loss."""
        self._standing()
        self._ending.add(name)
        self.in_service.discard(name)
        self._watch.remove(name)
        self.repair.forget(name)
        if (worker := self.groups.get(name) or self.shards.get(name)) is not None:
            end_worker(worker)
        for workers in (self.groups, self.shards, self.dead):
            workers.pop(name, None)
        self._ending.discard(name)

    async def end_all(self) -> None:
        """Whatever cannot be ended keeps nothing else from being so. Raises the first error at the end."""
        ending = [self.end(name) for name in [*self.shards, *self.groups]]
        results = await asyncio.gather(*ending, return_exceptions=True)
        self.places.release_all()
        if self._spares is not None:
            self._spares.close()
        for error in results:
            if isinstance(error, BaseException):
                raise error

    # --- links, experts, placements ---------------------------------------------------------------

    async def link(self, shard: str, group: str, timeout: float = MEETING_TIMEOUT) -> None:
        ends = self.shards[shard].actor, self.groups[group].actor
        localities = await asyncio.gather(*(end.locality.remote() for end in ends))
        kind, reason = choose_link(self.manifest.links.kind, *localities)
        log.info("link %s to %s: %s (%s)", shard, group, kind, reason)
        store = await self._meeting_point.address(kind)
        meeting = Meeting(*store, f"{shard}/{group}/{uuid.uuid4().hex}", timeout, kind)
        await asyncio.gather(
            self._order(ends[0], "connect", group, meeting), self._order(ends[1], "connect", shard, meeting)
        )

    async def disconnect(self, shard: str, group: str) -> None:
        if shard not in self.dead:
            await self._order(self.shards[shard].actor, "disconnect", group)

    async def load(self, group: str, pairs: list[Pair]) -> None:
        with self._load_of(group):
            await self._order(self.groups[group].actor, "load", pairs, await self._copy_sources(group, pairs))

    @contextlib.contextmanager
    def _load_of(self, worker: str) -> Iterator[None]:
        self._loading.add(worker)
        try:
            yield
        finally:
            self._loading.discard(worker)

    async def loaded(self) -> dict[str, int]:
        workers = self.groups | self.shards
        read, comes = await self._reports.read(workers, self._loading & workers.keys())
        if comes:  # steps may wait for just these experts, and give up where none are to be expected
            await self._reports.ask("expect_experts", self.shards, self.in_service)
        return read

    async def _copy_sources(self, group: str, pairs: list[Pair]) -> list[CopySource]:
        """What other groups of this fleet hold of the pairs, by the placement that is in force, and offer."""
        peers = [g for g in self.alive(self.groups) if g != group]
        near = [g for g in peers if self.node_of(g) == self.node_of(group)]
        wanted = copy_sources(pairs, self.placement, peers, near)
        if not wanted or self.manifest.experts.copy_from == "checkpoint":
            return []
        machine = (await self.groups[group].actor.locality.remote()).machine
        return await copy_offers(wanted, lambda peer: self._order(self.groups[peer].actor, "offer", machine))

    async def held(self, group: str) -> list[Pair]:
        held: list[tuple[int, int]] = await self.groups[group].actor.held.remote()
        return held

    async def free(self, group: str, pairs: list[Pair]) -> None:
        if group not in self.dead:
            await self._order(self.groups[group].actor, "drop", pairs)

    async def adopt(self, shard: str, placement: Placement) -> None:
        if shard not in self.dead:
            await self._order(self.shards[shard].actor, "adopt", placement)

    def committed(self, desired: Desired) -> None:
        self._enter_service(desired)
        self._changed()

    def _enter_service(self, desired: Desired) -> None:
        self.placement = desired.placement
        self._members = frozenset(desired.groups)
        self.in_service = set(self.alive(desired.shards))

    async def leave_service(self, shard: str, seconds: float) -> None:
        self.in_service.discard(shard)
        self._changed()
        if shard in self.dead:
            return
        # Ingress replicas learn of it within milliseconds; what they sent before that is drained like the rest.
        await asyncio.sleep(0.2)
        moved = await asyncio.wait_for(self._order(self.shards[shard].actor, "drain", seconds), seconds + DRAIN_GRACE)
        log.info("%s is drained, %d requests went elsewhere", shard, moved)

    # --- watching ---------------------------------------------------------------------------------

    def _lost(self, name: str, reason: str, unreachable: bool) -> None:
        """Take a worker for dead; `unreachable`: it may live, and its node may be the reason."""
        worker = self.groups.get(name) or self.shards.get(name)
        if worker is None or name in self.dead:
            return
        self.dead[name] = reason
        self.in_service.discard(name)
        self._watch.remove(name)
        self.repair.forget(name)
        if unreachable and worker.node_id is not None:
            self.places.suspect(worker.node_id)
        log.error("%s is lost: %s", name, reason)
        # Its resources are needed for whoever takes its place. Again and again where Ray's head is away.
        self._background.keep(f"the end of {name}", lambda: self._finish(worker))
        self._changed()
        self._died(name)

    async def _finish(self, worker: RayWorker) -> None:
        await asyncio.to_thread(self._standing)
        await asyncio.to_thread(end_worker, worker)

    def reachable(self) -> tuple[list[str], str | None]:
        """The shards in service that reach every expert, and why the others do not."""
        out, why = [], None
        for shard in sorted(self.in_service):
            failed = {group: reason for (of, group), reason in self.repair.failed.items() if of == shard}
            without = {group: reason for group, reason in self.dead.items() if group in self.groups} | failed
            if count := self.placement.orphans(without):
                words = "; ".join(f"{group}: {reason}" for group, reason in without.items())
                why = f"{count} experts cannot be reached from {shard} and are being restored ({words})"
            else:
                out.append(shard)
        return out, why

    # What link_repair asks.

    def is_there(self, worker: str) -> bool:
        known = worker in self.groups or worker in self.shards
        return known and worker not in self.dead and worker not in self._ending

    def groups_of(self, shard: str) -> list[str]:
        return [group for group in self.placement.groups() if group in self.groups]

    async def answers(self, worker: str) -> None:
        await (self.groups.get(worker) or self.shards[worker]).call("sign_of_life")

    async def relink(self, shard: str, group: str) -> None:
        await self.link(shard, group, RELINK_SECONDS)

    async def open_requests(self) -> int | None:
        """Of all shards that have started; None where a worker was lost, or a shard does not answer, whose streams may
        be on their way to another."""
        asked = self._reports.answering(self.shards)
        counts = await self._reports.ask("open_requests", self.shards, asked)
        return None if self.dead or len(counts) < len(asked) else sum(counts.values())

    async def rows_routed(self) -> dict[str, Any]:
        """Each live shard's counts of rows per (layer, expert), int64 [layers, experts]."""
        serving = [s for s in self.alive(self.shards) if s in self.in_service]
        return await self._reports.ask("rows_routed", self.shards, serving)

    def nodes(self) -> tuple[dict[str, str], dict[str, str]]:
        """As MeteredFleet of cluster/autoscale/loop.py says."""
        groups, shards = (
            {name: workers[name].node_id or "" for name in self.alive(workers) if name in named}
            for workers, named in ((self.groups, self._members), (self.shards, self.in_service))
        )
        return groups, shards

    def all_alive(self) -> bool:
        return not self.dead

    async def meters(self) -> tuple[dict[str, ShardMeter], dict[str, GroupMeter]]:
        groups, shards = self.nodes()
        asked = self._reports.ask("meter", self.shards, shards), self._reports.ask("meter", self.groups, groups)
        of_shards, of_groups = await asyncio.gather(*asked)
        return of_shards, of_groups

    async def statuses(self) -> list[JSON]:
        """Every worker's own words, shards first."""
        return list(
            await asyncio.gather(
                *(self._reports.status(ATTENTION, w) for w in list(self.shards.values())),
                *(self._reports.status(EXPERT, w) for w in list(self.groups.values())),
            )
        )
