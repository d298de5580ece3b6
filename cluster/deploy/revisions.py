"""The revisions that there are: the one that serves, one that is about to, and one that was rolled away and finishes
streams. `isotherm roll` goes from one to the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import ray

from isotherm.cluster.background import Background
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.roll import Quiet, roll
from isotherm.cluster.control.saved_state import SavedRevision, SavedState
from isotherm.cluster.deploy.places import resources
from isotherm.cluster.deploy.revision import Revision
from isotherm.cluster.deploy.roll_check import (
    check_memory,
    check_successor,
    open_checkpoint,
    room_for,
    wanted_values,
)
from isotherm.cluster.deploy.rolled_values import as_operated
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.operations import Operation, OperationLog, OperationRequest, Phase, Target
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import Placement

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5  # between two looks whether the streams of a revision that was rolled away have ended
ANNOUNCED_SECONDS = 1.0  # in which ingress replicas connect to shards that they are told of


def made_again(saved: SavedRevision, make: Callable[[int, Manifest, Checkpoint], Revision]) -> Revision:
    """The revision that a controller before this one has had, with the values that its workers have."""
    manifest = Manifest.model_validate_json(saved.manifest)
    return make(saved.number, manifest, open_checkpoint(manifest, saved.model))


class Revisions:
    """`manifest` gives what the cluster has now, and `given` is the directory of the model that it names; `make` makes
    a revision without workers, of a number, a manifest and a checkpoint; `save` writes down what is committed, and
    raises where that fails; `changed` is called when shards have come or gone; `swapped` when another revision
    serves."""

    def __init__(
        self,
        manifest: Callable[[], Manifest],
        given: str,
        serving: Revision,
        operations: OperationLog,
        make: Callable[[int, Manifest, Checkpoint], Revision],
        save: Callable[[], None],
        changed: Callable[[], None],
        swapped: Callable[[], None],
    ):
        self.serving, self._given = serving, Path(given)
        self.coming: Revision | None = None
        self.leaving: Revision | None = None
        self._manifest, self._operations, self._make = manifest, operations, make
        self._save, self._changed, self._swapped = save, changed, swapped
        self._open: int | None = None  # requests that `leaving` had when it was looked at last
        self._background = Background()

    # What the event feed is told of.

    @property
    def placement(self) -> Placement:
        return self.serving.fleet.placement

    def group_names(self) -> list[str]:
        return self.serving.fleet.group_names()

    # What is told of all of them.

    def as_operated(self) -> Manifest:
        """What the cluster was started with, with the numbers of workers and the model that operations have come to."""
        manifest, path = self._manifest(), self.serving.checkpoint.path
        desired = self.serving.reconfigurer.desired
        return as_operated(
            manifest, len(desired.shards), len(desired.groups), None if path == self._given else str(path)
        )

    def there(self) -> list[Revision]:
        return [r for r in (self.serving, self.coming, self.leaving) if r is not None]

    def shards_of_others(self) -> Mapping[int, tuple[str, ...]]:
        """As Membership says."""
        return {r.number: tuple(r.fleet.reachable()[0]) for r in (self.coming, self.leaving) if r is not None}

    async def status(self, loads: Mapping[str, JSON]) -> JSON:
        """What `isotherm status` says of workers and nodes; `loads`: of the workers that have reported lately. Of
        `leaving` it is not always known how many requests it has."""
        fleet, drained = self.serving.fleet, self.serving.reconfigurer.desired.drained
        workers = [worker for revision in self.there() for worker in await revision.statuses()]
        return {
            "leaving": None if self.leaving is None else self.leaving.as_dict() | {"open_requests": self._open},
            "placement_version": fleet.placement.version or None,
            "numerics": fleet.numerics.as_dict(),
            "workers": [worker | {"load": loads.get(worker["id"])} for worker in workers],
            "nodes": [
                {
                    "id": n["NodeID"],
                    "address": n["NodeManagerAddress"],
                    "alive": n["Alive"],
                    "drained": n["NodeID"] in drained,
                }
                for n in await asyncio.to_thread(ray.nodes)
            ],
        }

    def told(self, operation: Operation) -> JSON:
        """`waiting`: what it waits for, in words; tokens go on meanwhile."""
        waits: list[str] = []
        for revision in self.there() if not operation.phase.is_final else ():
            waits += [words for worker, words in revision.fleet.waits.items() if f"start {worker}" in operation.plan]
        if operation.finishes and self._open:
            waits.append(f"{self._open} requests finish on the workers that they began on")
        return operation.as_dict() | {"waiting": waits}

    def died(self, number: int) -> bool:
        """A worker of that revision has died. Whether it is replaced: before it is committed, nothing is."""
        for revision in (self.serving, self.leaving):
            if revision is not None and revision.number == number:
                revision.reconfigurer.heal()
                return True
        return False

    # --- rolling ----------------------------------------------------------------------------------

    async def submit(self, request: OperationRequest) -> Operation:
        """Begin an operation that serves another model, or has other values for workers; it goes on in the background.
        Raises OperationError."""
        target, serving = request.target, self.serving
        if (known := self._operations.known(request)) is not None:
            return known
        path = serving.checkpoint.path if target.model is None else Path(target.model)
        values = wanted_values(self._manifest(), target.manifest, target.model is not None, self.as_operated())
        checkpoint = await asyncio.to_thread(check_successor, values, serving.checkpoint, path)
        desired = serving.reconfigurer.planner.twin(serving.reconfigurer.desired, target)
        needs = check_memory(values.manifest, checkpoint, len(desired.shards))
        needs += room_for([resources(values.manifest, worker) for worker in (*desired.shards, *desired.groups)])
        if not request.dry_run:
            needs.refuse()
        revision = None if request.dry_run else self._make(serving.number + 1, values.manifest, checkpoint)
        operation, new = serving.reconfigurer.open(request)
        if not new:
            return operation
        operation.plan = values.words() + self._described(desired, path) + needs.words
        if revision is None:
            operation.reasons += needs.lacks
            serving.reconfigurer.transactions.enter(operation, Phase.DONE, "dry run: nothing was changed")
        else:
            self._background.spawn(f"operation {operation.id}", self._roll(operation, revision, request))
        return operation

    def _described(self, desired: Desired, path: Path) -> list[str]:
        """What is done, a line each."""
        now = self.serving
        return [
            *(f"start {worker}" for worker in (*desired.groups, *desired.shards)),
            f"serve {path} as revision {now.number + 1}, with placement version {desired.placement.version}",
            f"finish the streams of revision {now.number}, {now.checkpoint.path}",
            *(f"end {worker}" for worker in (*now.fleet.shard_names(), *now.fleet.group_names())),
        ]

    async def _roll(self, operation: Operation, revision: Revision, request: OperationRequest) -> None:
        before, successor = self.serving.reconfigurer, _Successor(self, revision, request.target)
        if await roll(before.transactions, operation, successor, request.deadline_seconds):
            self._changed()
            self._begin_to_finish(operation)

    def _begin_to_finish(self, operation: Operation) -> None:
        """Again and again where Ray's head is away."""
        self._background.keep(f"the end of operation {operation.id}", lambda: self._finish(operation))

    async def _finish(self, operation: Operation) -> None:
        """Wait until no stream needs the revision before any more, or can go on there, and end it. What is left of it
        where this process dies meanwhile is ended by the next one, for nobody names it any more."""
        quiet, leaving, self._open = Quiet(), self.leaving, None
        clock = asyncio.get_running_loop().time
        if leaving is not None:
            while not quiet.look(self._open, clock(), bool(leaving.fleet.reachable()[0])):
                await asyncio.sleep(LOOK_SECONDS)
                self._open = await leaving.fleet.open_requests()
            self.leaving = None
            try:
                self._save()
                self._changed()
                await leaving.reconfigurer.interrupt("its streams have finished")
                await leaving.fleet.end_all()
            except BaseException:
                self.leaving = leaving
                raise
            self._grow(leaving.reconfigurer.desired, operation)
        self.serving.reconfigurer.transactions.enter(operation, Phase.DONE)

    def _grow(self, before: Desired, operation: Operation) -> None:
        """There is room now for as many workers as there were, if fewer were asked for until then and nobody has asked
        for others meanwhile."""
        had = len(before.groups), len(before.shards)
        asked = operation.target.get("expert_groups", had[0]), operation.target.get("attention_shards", had[1])
        now = self.serving.reconfigurer.desired
        if (len(now.groups), len(now.shards)) == asked:
            wanted = max(asked[0], had[0]), max(asked[1], had[1])
            if wanted != asked:
                self.serving.reconfigurer.restore(*wanted, "as many workers as before others took their place")

    def take_over(self, coming: Revision) -> None:
        """As Successor says."""
        dead = [w for w in (*coming.fleet.group_names(), *coming.fleet.shard_names()) if w in coming.fleet.dead]
        if dead:
            raise RuntimeError(f"{dead[0]} was lost: {coming.fleet.dead[dead[0]]}")
        before = self.serving, self.coming, self.leaving
        self.serving, self.coming, self.leaving = coming, None, self.serving
        try:
            self._save()
        except BaseException:
            self.serving, self.coming, self.leaving = before
            raise
        log.warning("revision %d serves: %s", coming.number, coming.checkpoint.path)
        self._swapped()

    def saved(self) -> tuple[SavedRevision, SavedRevision | None, Mapping[str, int]]:
        """What of SavedState is about workers."""
        leaving = None if self.leaving is None else self.leaving.saved()
        return self.serving.saved(), leaving, self.serving.reconfigurer.planner.numbers

    # --- outliving a controller -------------------------------------------------------------------

    async def resume(self, saved: SavedState) -> bool:
        """Take over the workers that a controller before this one has left. Whether it had come so far as to serve;
        where it had not, none is left."""
        serving = self.serving
        elsewhere: set[str] = set()
        if saved.leaving is not None:
            self.leaving = made_again(saved.leaving, self._make)
            self.leaving.reconfigurer.planner.numbers = serving.reconfigurer.planner.numbers
            elsewhere = set(saved.leaving.workers)
            self.leaving.find(saved.leaving)
        strays = [name for name in serving.find(saved.serving) if name not in elsewhere]
        serving.fleet.take_in(strays)
        serving.reconfigurer.planner.numbers.update(saved.numbers)
        serving.reconfigurer.planner.use_names(strays)
        if not saved.serving.desired.placement.version:  # it died while it started the cluster
            for worker in strays:
                await serving.fleet.end(worker)
            return False
        for revision in filter(None, (serving, self.leaving)):
            revision.reconfigurer.take_over()
        if (operation := self._operations.finishing()) is not None:
            self._begin_to_finish(operation)
        return True

    async def stop(self) -> None:
        """End every worker."""
        for revision in self.there():
            await revision.reconfigurer.interrupt("the cluster is being ended")
        self._background.cancel()
        for revision in self.there():
            await revision.fleet.end_all()


class _Successor:
    """`Successor` of cluster/control/roll.py."""

    def __init__(self, revisions: Revisions, revision: Revision, target: Target):
        self._revisions, self._revision, self._target = revisions, revision, target
        self.waits = revision.fleet.waits

    async def start(self) -> None:
        revisions, revision = self._revisions, self._revision
        before = revisions.serving.reconfigurer
        planner = revision.reconfigurer.planner
        planner.numbers = before.planner.numbers  # names are never used again, by whichever revision
        planned = before.planner.twin(before.desired, self._target)
        planner.use_names([*planned.groups, *planned.shards])
        revision.fleet.load_view = revisions.serving.fleet.load_view
        revision.fleet.repair.results = revisions.serving.fleet.repair.results
        revisions.coming = revision
        await revision.start(planned, lambda _: None)

    async def announce(self) -> None:
        self._revision.fleet.committed(self._revision.reconfigurer.desired)
        await asyncio.sleep(ANNOUNCED_SECONDS)

    def take_over(self) -> None:
        self._revisions.take_over(self._revision)

    async def end(self) -> None:
        self._revisions.coming = None
        await self._revision.fleet.end_all()
