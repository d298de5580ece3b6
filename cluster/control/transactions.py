"""Carries out changes of the fleet as transactions: prepare (start workers, link, load), commit (every shard adopts the
new placement), free. What fails before the commit is undone, and the old placement serves on. One is carried out at a
time; it takes its turn when it has places for the workers that it starts.

Decides nothing: what there is to be comes as a plan, and what is done to workers is done by a `Fleet`."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotherm.cluster.control.fleet import Fleet
from isotherm.cluster.control.planner import Desired, Planner
from isotherm.cluster.errors import named_line, one_line
from isotherm.cluster.messages.operations import Operation, OperationError, Phase
from isotherm.cluster.placement.changes import Difference, Pair, difference

log = logging.getLogger(__name__)
COMMIT_SECONDS = 60.0  # in which every shard must have adopted a placement
HELD_SECONDS = 5.0  # in which a group says what it holds; one that loads something says it when that is done
DRAIN_SECONDS = 20.0  # after which a leaving shard gives its requests to others
AT_ONCE_SECONDS = 1.0  # in which places for workers are found where there are any


@dataclass
class _Undo:
    """What has been prepared, to be taken back."""

    workers: list[str] = field(default_factory=list)
    loads: list[tuple[str, list[Pair]]] = field(default_factory=list)


class Transactions:
    """`changed` is called whenever the log of operations has changed; `save` to write down `desired`, the planner's
    numbers and the log where they outlive this process: it raises where that fails, and then nothing is committed."""

    def __init__(self, fleet: Fleet, planner: Planner, changed: Callable[[], None], save: Callable[[], None]) -> None:
        self._fleet, self._planner, self._changed, self._save = fleet, planner, changed, save
        self.desired = Desired((), (), fleet.placement)  # what was committed last
        self.turn = asyncio.Lock()  # of the one that is carried out
        self._interruptible: dict[
            str, tuple[Operation, asyncio.Future[None]]
        ] = {}  # what waits for places or is prepared, by operation
        self._phase_entered = asyncio.Event()  # another one after each phase

    def enter(self, operation: Operation, phase: Phase, reason: str = "") -> None:
        operation.enter(phase, time.time(), reason)
        log.info("operation %s: %s %s", operation.id, phase.value, reason)
        entered, self._phase_entered = self._phase_entered, asyncio.Event()
        entered.set()
        self._changed()

    async def ended(self, operation: Operation) -> Operation:
        """The operation when it has ended."""
        while not operation.phase.is_final:
            await self._phase_entered.wait()
        return operation

    async def take_over(self) -> None:
        """Begin with the workers of `desired`, which a controller before this one has left: each shard routes by what
        was committed, and whatever was half prepared or half freed is ended. Traffic goes on meanwhile. Raises what
        went wrong when all the rest is done; then it may be done again."""
        async with self.turn:
            fleet, desired = self._fleet, self.desired
            fleet.avoid = desired.drained
            try:
                await asyncio.wait_for(self._bring_back(desired), COMMIT_SECONDS)
            finally:
                workers = fleet.group_names() + fleet.shard_names()
                await _all(fleet.end(w) for w in workers if w not in desired.groups + desired.shards)

    async def _bring_back(self, desired: Desired) -> None:
        fleet = self._fleet
        # A shard may hold the offer of a placement that was never committed: this one is offered after it.
        await _all(fleet.adopt(s, desired.placement) for s in fleet.alive(desired.shards))

        async def free_rest(group: str) -> None:
            wanted = set(desired.placement.held_by(group))
            held = await asyncio.wait_for(fleet.held(group), HELD_SECONDS)
            if pairs := [pair for pair in held if pair not in wanted]:
                await fleet.free(group, pairs)

        groups = map(free_rest, fleet.alive(desired.groups))
        await _all([*groups, self._free(desired, Difference({}, {}))])

    async def run(self, operation: Operation, plan: Callable[[Sequence[str]], Desired], seconds: float) -> None:
        """`plan` is asked twice, for the cluster may change while places are waited for: it is given the names of
        workers that have one."""
        names: list[str] = []
        try:
            try:
                async with self.turn:  # not while the cluster is in between
                    begin = time.monotonic()
                    desired = plan(())
                    operation.plan = self._planner.describe(self.desired, desired)
                    names = self._planner.new(desired)
                    self._planner.use_names(names)
                await self.within(seconds, operation, self._reserve(operation, names, desired.drained))
            except Exception as error:  # nothing has been changed, and another one may be under way
                self.enter(operation, Phase.ROLLING_BACK, reason_of(error, seconds))
                self.enter(operation, Phase.ROLLED_BACK)
                return
            async with self.turn:
                await self.transact(operation, lambda: plan(names), seconds, begin + seconds)
        finally:
            for name in names:
                self._fleet.release(name)

    async def _reserve(self, operation: Operation, names: list[str], avoid: frozenset[str]) -> None:
        """Places for new workers. Where there are none, the operation waits outside of the queue."""
        reserving = asyncio.ensure_future(_all(self._fleet.reserve(name, avoid) for name in names))
        try:
            await asyncio.wait([reserving], timeout=AT_ONCE_SECONDS)
            if not reserving.done():
                operation.waiting = True
                operation.reasons.append("waiting for resources")
                self._changed()
            await reserving
        finally:
            operation.waiting = False
            reserving.cancel()
            await asyncio.wait([reserving])

    async def transact(
        self, operation: Operation, plan: Callable[[], Desired], seconds: float, deadline: float = math.inf
    ) -> bool:
        """Carry a change out or undo it. Whether it was undone because its time, which ends at `deadline` at the
        latest, was over."""
        undo = _Undo()
        try:
            desired = plan()
            operation.plan = self._planner.describe(self.desired, desired)
            self._planner.use_names([*desired.groups, *desired.shards])
            self._fleet.avoid = desired.drained
            change = difference(self._fleet.placement, desired.placement)
            self.enter(operation, Phase.PREPARING)
            await self.within(
                min(seconds, deadline - time.monotonic()), operation, self._prepare(operation, desired, change, undo)
            )
            self.enter(operation, Phase.COMMITTING)
            await asyncio.wait_for(self._commit(operation, desired), COMMIT_SECONDS)
        except Exception as error:
            await self._roll_back(operation, undo, reason_of(error, seconds))
            return isinstance(error, asyncio.TimeoutError)
        try:
            await self._free(desired, change)
        except Exception as error:  # the new state serves; what could not be freed is only memory
            log.exception("operation %s: could not free everything", operation.id)
            operation.reasons.append(f"committed, but not everything was freed: {one_line(error)}")
        self.enter(operation, Phase.DONE)
        return False

    def give_way(self, why: str, which: Callable[[Operation], bool]) -> list[asyncio.Future[None]]:
        """Roll back what waits for places or is being prepared, with this reason. What has been committed goes on.
        Gives what ends now."""
        ending = []
        for operation, work in self._interruptible.values():
            if which(operation):
                operation.reasons.append(f"gives way: {why}")
                work.cancel()
                ending.append(work)
        return ending

    async def within(
        self,
        seconds: float,
        operation: Operation,
        work: Coroutine[Any, Any, None],
        waits: Mapping[str, str] | None = None,
    ) -> None:
        """Raises what `work` raises, TimeoutError when its time is over, OperationError when it has given way. `waits`:
        what workers of another fleet wait for."""
        working = asyncio.ensure_future(work)
        self._interruptible[operation.id] = operation, working
        try:
            await asyncio.wait([working], timeout=max(0.0, seconds))
        finally:
            del self._interruptible[operation.id]
        if not working.done():
            places = (self._fleet.waits if waits is None else waits).items()
            why = "; ".join(words for worker, words in places if f"start {worker}" in operation.plan)
            working.cancel()
            await asyncio.wait([working])
            raise asyncio.TimeoutError(why)
        if working.cancelled():
            raise OperationError("it was interrupted")
        working.result()

    async def _prepare(self, operation: Operation, desired: Desired, change: Difference, undo: _Undo) -> None:
        fleet = self._fleet
        new = self._planner.new(desired)
        new_groups, new_shards = [g for g in desired.groups if g in new], [s for s in desired.shards if s in new]
        stages = len(new_groups) + len(new_shards) + len(change.loads) + 1
        done = 0

        async def step(work: Awaitable[None]) -> None:
            nonlocal done
            await work
            done += 1
            operation.progress = round(0.9 * done / stages, 4)

        undo.workers += new_groups + new_shards
        old_shards = fleet.alive(fleet.shard_names())
        await _all(step(fleet.start_group(g)) for g in new_groups)
        await _all(
            [
                *(step(fleet.start_shard(s)) for s in new_shards),
                *(fleet.link(s, g) for s in old_shards for g in new_groups),
            ]
        )
        await _all(fleet.link(s, g) for s in new_shards for g in desired.groups)
        undo.loads += [(g, pairs) for g, pairs in change.loads.items() if g not in new_groups]
        await _all(step(fleet.load(g, pairs)) for g, pairs in change.loads.items())

    async def _commit(self, operation: Operation, desired: Desired) -> None:
        """Also shards that will leave adopt it: until they are drained they still compute. It holds when it is written
        down, which is before anything is freed."""
        fleet = self._fleet
        shards = fleet.alive(dict.fromkeys([*fleet.shard_names(), *desired.shards]))
        if not set(shards) & set(desired.shards):
            raise RuntimeError("no attention shard is left to commit to")
        await _all(fleet.adopt(s, desired.placement) for s in shards)
        before = self.desired
        self.desired, operation.committed = desired, True
        try:
            self._save()
        except BaseException:
            self.desired, operation.committed = before, False
            raise
        fleet.committed(desired.placement)

    async def _free(self, desired: Desired, change: Difference) -> None:
        fleet = self._fleet
        await _all(fleet.free(g, pairs) for g, pairs in change.frees.items() if g in desired.groups)
        leaving = [s for s in fleet.shard_names() if s not in desired.shards]
        await _all(fleet.leave_service(s, DRAIN_SECONDS) for s in leaving)
        for shard in leaving:
            await fleet.end(shard)
        for group in [g for g in fleet.group_names() if g not in desired.groups]:
            await _all(fleet.disconnect(s, group) for s in fleet.alive(fleet.shard_names()))
            await fleet.end(group)

    async def _roll_back(self, operation: Operation, undo: _Undo, reason: str) -> None:
        self.enter(operation, Phase.ROLLING_BACK, reason)
        fleet = self._fleet
        fleet.avoid = self.desired.drained
        try:
            old = fleet.placement
            # A shard may have adopted the new placement already: it must leave it before anything is freed.
            stay = [s for s in fleet.alive(fleet.shard_names()) if s not in undo.workers]
            await asyncio.wait_for(_all(fleet.adopt(s, old) for s in stay), COMMIT_SECONDS)
            for group, pairs in undo.loads:
                await fleet.free(group, pairs)
            for worker in undo.workers:
                if worker in fleet.group_names():
                    await _all(fleet.disconnect(s, worker) for s in stay)
                if worker in fleet.group_names() + fleet.shard_names():
                    await fleet.end(worker)
        except Exception as error:
            log.exception("operation %s: roll-back failed", operation.id)
            self.enter(operation, Phase.FAILED, f"roll-back failed: {named_line(error)}")
            return
        self.enter(operation, Phase.ROLLED_BACK)


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Wait for everything, then raise the first error, so that nothing goes on behind the caller's back."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def reason_of(error: Exception, seconds: float) -> str:
    """Why an operation fails that had so many seconds."""
    if isinstance(error, asyncio.TimeoutError):
        return ": ".join(filter(None, [f"not within {seconds:g} s", str(error)]))
    return named_line(error)
