"""From one revision to the next: which values the workers of each have, also those that replace others and those of a
controller that comes back. Workers here are a table."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from table_fleet import TableFleet
from virtual_time import run_in_virtual_time

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.roll import NOWHERE_SECONDS
from isotherm.cluster.control.saved_state import SavedState, decode
from isotherm.cluster.deploy import revisions as revisions_module
from isotherm.cluster.deploy.revision import Revision
from isotherm.cluster.deploy.revisions import Revisions, made_again
from isotherm.cluster.deploy.roll_check import Room, open_checkpoint
from isotherm.cluster.deploy.rolled_values import with_workers_of
from isotherm.cluster.manifest import Manifest, parse_manifest
from isotherm.cluster.messages.operations import Operation, OperationError, OperationLog, Phase, parse_operation
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.fingerprint import ClusterNumerics, Fingerprint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.placement.table import Placement

LIKE = Fingerprint("0123", "bfloat16", "stored", "cpu", "native", 1, "avx2")
STARTED = parse_manifest({"engine": {"kv_memory": "64MiB"}, "served_name": "shown"})
OTHER = {"engine": {"kv_memory": "32MiB"}, "http": {"aliases": ["also"]}}


class Workers:
    """Those that live, with the KV memory that each was started with: they outlive the controller."""

    def __init__(self) -> None:
        self.kv_memory: dict[str, int] = {}


class ValuedFleet(TableFleet):
    """What Revision and Revisions want of a RayFleet."""

    def __init__(self, workers: Workers, manifest: Manifest):
        super().__init__(["expert-0"], [])
        self.placement, self.experts = Placement(0, (), ()), {}
        self.workers, self.manifest = workers, manifest
        self.numerics = ClusterNumerics("refuse")
        self.repair = SimpleNamespace(results={})
        self.load_view, self.in_service = lambda: None, set()
        self.open = 0  # requests

    async def start_group(self, name: str) -> None:
        await super().start_group(name)
        self.numerics.admit(name, LIKE)
        self.workers.kv_memory[name] = self.manifest.engine.kv_memory

    async def start_shard(self, name: str) -> None:
        await super().start_shard(name)
        self.workers.kv_memory[name] = self.manifest.engine.kv_memory

    async def end(self, worker: str) -> None:
        await super().end(worker)
        self.workers.kv_memory.pop(worker, None)

    async def open_requests(self) -> int | None:
        return None if self.dead else self.open

    def reachable(self) -> tuple[list[str], None]:
        return self.alive(self.routes), None

    def find(self, desired: Desired) -> list[str]:
        groups, shards, self.placement = desired.groups, desired.shards, desired.placement
        self.experts, self.routes = {g: set() for g in groups}, dict.fromkeys(shards)
        self.links = {(s, g) for s in shards for g in groups}
        return [name for name in self.workers.kv_memory if name not in (*groups, *shards)]

    def take_in(self, strays: Iterable[str]) -> None:
        assert not list(strays)

    async def adopt(self, shard: str, placement: Any) -> None:
        for group in placement.groups():
            self.experts[group] |= set(placement.held_by(group)) if shard in self.workers.kv_memory else set()
        await super().adopt(shard, placement)


class Controller:
    """As much of one as there is to rolling. `saved`: what the one before has written down."""

    def __init__(self, workers: Workers, saved: bytes | None = None):
        self.workers, self.written = workers, saved
        state = None if saved is None else decode(saved)
        self.front_door = STARTED if state is None else Manifest.model_validate_json(state.manifest)
        self.log = OperationLog() if state is None else OperationLog.load(state.operations, 1.0)
        if state is None:
            first = self.make(0, STARTED, open_checkpoint(STARTED, bundled_model()))
        else:
            first = made_again(state.serving, self.make)
        self.revisions = Revisions(
            lambda: self.manifest,
            str(bundled_model()),
            first,
            self.log,
            self.make,
            self.save,
            lambda: None,
            lambda: None,
        )
        self.state = state

    @property
    def manifest(self) -> Manifest:
        return with_workers_of(self.front_door, self.revisions.serving.manifest)

    def make(self, number: int, manifest: Manifest, checkpoint: Checkpoint) -> Revision:
        fleet: Any = ValuedFleet(self.workers, manifest)
        return Revision(number, manifest, checkpoint, fleet, self.log, lambda: None, self.save)

    def save(self) -> None:
        state = SavedState(*self.revisions.saved(), self.log.dump(), "", self.front_door.model_dump_json())
        self.written = state.encode()

    async def start(self) -> None:
        serving = self.revisions.serving
        planned = serving.reconfigurer.planner.first(1, 2, (1, 2), 8)
        await serving.start(planned, lambda _: None)
        serving.fleet.committed(planned)
        self.save()

    async def roll(self, **target: Any) -> Operation:
        return await self.revisions.submit(parse_operation(target))

    async def committed(self, operation: Operation) -> None:
        while not operation.committed and not operation.phase.is_final:
            await asyncio.sleep(0.1)
        assert operation.committed, operation.reasons


@pytest.fixture(autouse=True)
def _room(monkeypatch):
    """There is as much as is wanted."""
    for name in ("check_memory", "room_for"):
        monkeypatch.setattr(revisions_module, name, lambda *_: Room(["there is room"]))

    async def at_once(call, *arguments):
        return call(*arguments)

    monkeypatch.setattr(revisions_module.asyncio, "to_thread", at_once)


def test_values_are_rolled_with_the_same_weights():
    async def go() -> None:
        workers = Workers()
        controller = Controller(workers)
        await controller.start()
        assert set(workers.kv_memory.values()) == {64 << 20}
        operation = await controller.roll(manifest=OTHER)
        await controller.committed(operation)
        serving, leaving = controller.revisions.serving, controller.revisions.leaving
        assert leaving is not None and (serving.number, leaving.number) == (1, 0)
        assert serving.checkpoint.path == leaving.checkpoint.path == bundled_model()
        assert serving.fleet.numerics.system_fingerprint == leaving.fleet.numerics.system_fingerprint
        assert serving.limits.tokens < leaving.limits.tokens
        had = {role: {workers.kv_memory[w] for w in r.fleet.shard_names() + r.fleet.group_names()}
               for role, r in (("new", serving), ("old", leaving))}  # fmt: skip
        assert had == {"new": {32 << 20}, "old": {64 << 20}}
        assert await serving.reconfigurer.ended(operation) and operation.phase is Phase.DONE
        assert sorted(workers.kv_memory) == ["attention-1", "expert-2", "expert-3"]
        assert operation.plan[:3] == [
            "change engine.kv_memory: 67108864 → 33554432",
            'leave served_name: "shown" → null (by isotherm roll --ingress FILE)',
            'leave http.aliases: [] → ["also"] (by isotherm roll --ingress FILE)',
        ]
        assert controller.manifest == STARTED.model_copy(update={"engine": serving.manifest.engine})
        with pytest.raises(OperationError, match="values that the workers have already"):
            await controller.roll(manifest=OTHER)
        await controller.revisions.stop()

    run_in_virtual_time(go())


def test_a_dry_run_changes_nothing():
    async def go() -> None:
        workers = Workers()
        controller = Controller(workers)
        await controller.start()
        before = dict(workers.kv_memory)
        operation = await controller.roll(manifest=OTHER, dry_run=True)
        assert operation.phase is Phase.DONE and "change engine.kv_memory: 67108864 → 33554432" in operation.plan
        assert workers.kv_memory == before and controller.manifest == STARTED
        await controller.revisions.stop()

    run_in_virtual_time(go())


def test_what_fails_leaves_the_values_as_they_were():
    async def go() -> None:
        workers = Workers()
        controller = Controller(workers)
        await controller.start()
        made = controller.make

        def failing(*arguments: Any) -> Revision:
            revision: Any = made(*arguments)
            revision.fleet.fails = {"start expert-3"}
            return revision

        controller.revisions._make = failing
        before, written = dict(workers.kv_memory), controller.written
        operation = await controller.roll(manifest=OTHER)
        await controller.revisions.serving.reconfigurer.ended(operation)
        assert operation.phase is Phase.ROLLED_BACK and workers.kv_memory == before
        assert controller.manifest == STARTED and decode(controller.written).serving == decode(written).serving
        await controller.revisions.stop()

    run_in_virtual_time(go())


def test_whoever_replaces_a_worker_of_either_revision_has_that_ones_values():
    """Also where a controller that came back replaces it."""

    async def go() -> None:
        workers = Workers()
        first = Controller(workers)
        await first.start()
        operation = await first.roll(manifest=OTHER)
        first.revisions._finish = lambda _: asyncio.Event().wait()  # its streams do not end
        await first.committed(operation)
        new, old = first.revisions.serving, first.revisions.leaving
        for revision, worker in ((new, "expert-3"), (old, "expert-0")):
            revision.fleet.dead.add(worker)
            assert first.revisions.died(revision.number)
        while len(workers.kv_memory) < 6 or {"expert-0", "expert-3"} & workers.kv_memory.keys():
            await asyncio.sleep(0.1)
        check(first)

        second = Controller(workers, first.written)  # the first one is dead
        assert second.manifest == first.manifest and second.revisions.serving.number == 1
        assert await second.revisions.resume(second.state)
        assert second.revisions.leaving.manifest.engine.kv_memory == 64 << 20
        assert second.revisions.leaving.limits == old.limits and second.revisions.serving.limits == new.limits
        for revision in (second.revisions.serving, second.revisions.leaving):
            revision.fleet.open = 1
            lost = revision.fleet.shard_names()[0]
            revision.fleet.dead.add(lost)
            second.revisions.died(revision.number)
            while lost in workers.kv_memory and lost in revision.fleet.shard_names():
                await asyncio.sleep(0.1)
            workers.kv_memory.pop(lost, None)
        while len(workers.kv_memory) < 6:
            await asyncio.sleep(0.1)
        check(second)
        await second.revisions.stop()

    def check(controller: Controller) -> None:
        for revision, kv_memory in ((controller.revisions.serving, 32 << 20), (controller.revisions.leaving, 64 << 20)):
            names = revision.fleet.shard_names() + revision.fleet.group_names()
            assert {workers_of(controller)[name] for name in names} == {kv_memory}, names

    def workers_of(controller: Controller) -> dict[str, int]:
        return controller.workers.kv_memory

    run_in_virtual_time(go())


def test_a_revision_that_lost_its_only_shard_ends_though_there_is_no_room_for_another():
    async def go() -> None:
        workers = Workers()
        controller = Controller(workers)
        await controller.start()
        operation = await controller.roll(manifest=OTHER)
        await controller.committed(operation)
        clock, leaving = asyncio.get_running_loop().time, controller.revisions.leaving
        assert leaving is not None
        begin, leaving.fleet.open = clock(), 1
        leaving.fleet.start_shard = lambda _: asyncio.Event().wait()  # type: ignore[assignment, method-assign]
        (lost,) = leaving.fleet.shard_names()
        leaving.fleet.dead.add(lost)
        assert controller.revisions.died(leaving.number)
        serving = controller.revisions.serving.reconfigurer
        await asyncio.wait_for(serving.ended(operation), 1000.0)
        assert operation.phase is Phase.DONE and clock() - begin > NOWHERE_SECONDS
        assert controller.revisions.leaving is None
        assert sorted(workers.kv_memory) == ["attention-1", "expert-2", "expert-3"]
        assert controller.log.under_way() is None
        more = serving.submit(parse_operation({"attention_shards": 2}))
        assert (await asyncio.wait_for(serving.ended(more), 1000.0)).phase is Phase.DONE
        await asyncio.sleep(1000.0)  # nobody goes on healing what is gone
        assert [o for o in controller.log.all() if not o.phase.is_final] == []
        await controller.revisions.stop()

    run_in_virtual_time(go())


def test_ingress_replicas_are_told_when_a_shard_of_the_revision_counts_as_hung():
    for values, seconds in (({}, 15.0), ({"liveness": {"timeout": 0}}, 0.0)):
        manifest, fleet = parse_manifest(values), ValuedFleet(Workers(), STARTED)
        checkpoint = Checkpoint.open(bundled_model())
        revision = Revision(0, manifest, checkpoint, fleet, OperationLog(), lambda: None, lambda: None)  # type: ignore[arg-type]
        assert revision.limits.hangs_after == seconds
