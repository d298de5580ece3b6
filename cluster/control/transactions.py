"""Carries out changes of the fleet as transactions: prepare (start workers, link, load), commit (every shard adopts the
new placement), free. What fails before the commit is undone, and the old placement serves on. One is carried out at a
time; it takes its turn when it has places for the workers that it starts.

Decides nothing: what there is to be comes as a plan, and what is done to workers is done by a `Fleet`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotherm.cluster.control.fleet import Fleet
from isotherm.cluster.control.planner import Desired, Planner
from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import OPERATOR, RECOVERY, Operation, OperationError, Phase, summed_up
from isotherm.cluster.placement.changes import Difference, difference
from isotherm.cluster.within import within

log = logging.getLogger(__name__)
COMMIT_SECONDS = 60.0  # in which every shard must have adopted a placement
HELD_SECONDS = 5.0  # in which a group says what it holds; one that loads something says it when that is done
DRAIN_SECONDS = 20.0  # after which a leaving shard gives its requests to others
GIVE_BACK_SECONDS = 3.0  # in which it gives them back where a worker is lost meanwhile
STEP_SECONDS = 10.0  # that a worker has to free experts or to close a link, while what waits for its turn waits
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
        self.lost = asyncio.Event()  # a worker was lost whose recovery has not had its turn yet: it comes first
        self._leftovers = False  # groups may hold experts that the placement does not give them
        # What waits for places or is prepared, by operation
        self._interruptible: dict[str, tuple[Operation, asyncio.Future[None]]] = {}
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
            # A shard may hold the offer of a placement that was never committed: this one is offered after it.
            failed = await _settle("adopt", {s: fleet.adopt(s, desired.placement) for s in fleet.alive(desired.shards)})
            self._leftovers = True
            if not fleet.alive(failed):
                failed |= await self._free(desired, {})
            failed |= await self._let_go(desired)
            if fleet.alive(failed):  # one that died in between is replaced like any other
                version = desired.placement.version
                raise OperationError(f"not every worker is back at placement version {version}: {_words(failed)}")

    async def run(self, operation: Operation, plan: Callable[[Sequence[str]], Desired], seconds: float) -> None:
        """`plan` is asked twice, for the cluster may change while places are waited for: it is given the names of
        workers that have one."""
        with self._ended_with_its_task(operation):
            await self._run(operation, plan, seconds)

    @contextlib.contextmanager
    def _ended_with_its_task(self, operation: Operation) -> Iterator[None]:
        """One whose task is cancelled, for every worker is being ended, is not under way any more: others would wait
        for it."""
        try:
            yield
        except asyncio.CancelledError:
            if not operation.phase.is_final:
                self.enter(operation, Phase.DONE if operation.committed else Phase.ROLLED_BACK, "it was interrupted")
            raise

    async def _run(self, operation: Operation, plan: Callable[[Sequence[str]], Desired], seconds: float) -> None:
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
        with self._ended_with_its_task(operation):
            return await self._transact(operation, plan, seconds, deadline)

    async def _transact(
        self, operation: Operation, plan: Callable[[], Desired], seconds: float, deadline: float
    ) -> bool:
        undo = _Undo()
        try:
            await self._end_strays()
            desired = plan()
            operation.plan = self._planner.describe(self.desired, desired)
            self._planner.use_names([*desired.groups, *desired.shards])
            self._fleet.avoid = desired.drained
            change = difference(self._fleet.placement, desired.placement)
            self.enter(operation, Phase.PREPARING)
            # Nobody has said how long what the cluster does by itself may take: however large the weights are, it goes
            # on as long as they come.
            goes_on = None if operation.origin == OPERATOR else self._fleet.loaded
            await self.within(
                min(seconds, deadline - time.monotonic()),
                operation,
                self._prepare(operation, desired, change, undo),
                goes_on=goes_on,
            )
            self.enter(operation, Phase.COMMITTING)
            await adopted(self._commit(operation, desired))
        except Exception as error:
            await self._roll_back(operation, undo, reason_of(error, seconds))
            return isinstance(error, asyncio.TimeoutError)
        failed = await self._free(desired, change.frees)
        failed |= await self._let_go(desired)
        if failed:  # the new state serves; what could not be freed is only memory
            operation.reasons.append(f"committed, but not everything was freed: {_words(failed)}")
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
        goes_on: Callable[[], Awaitable[Mapping[str, int]]] | None = None,
    ) -> None:
        """Raises what `work` raises, TimeoutError when its time is over, OperationError when it has given way. `waits`:
        what workers of another fleet wait for. `goes_on` is asked when the time is over: as long as it says something
        new, the time begins again."""
        if self.lost.is_set() and operation.origin != RECOVERY:  # it waited for its turn, and could not be told
            work.close()
            raise OperationError("gives way: a worker was lost")
        working = asyncio.ensure_future(work)
        self._interruptible[operation.id] = operation, working
        try:
            await asyncio.wait([working], timeout=max(0.0, seconds))
            heard: Mapping[str, int] = {}
            while goes_on is not None and not working.done() and (now := await goes_on()) != heard:
                heard = now
                await asyncio.wait([working], timeout=seconds)
        finally:
            del self._interruptible[operation.id]
        if not working.done():
            places = (self._fleet.waits if waits is None else waits).items()
            why = summed_up([words for worker, words in places if f"start {worker}" in operation.plan])
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
        old_shards = fleet.alive(self.desired.shards)
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
        shards = fleet.alive(dict.fromkeys([*self.desired.shards, *desired.shards]))
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
        fleet.committed(desired)

    async def _free(self, desired: Desired, frees: Mapping[str, list[Pair]]) -> dict[str, str]:
        """Free experts, now that every shard routes by what is desired: those named, and all that were left over
        before. As _settle."""
        fleet, extra = self._fleet, dict(frees)
        failed: dict[str, str] = {}
        if self._leftovers:

            async def ask(group: str) -> None:
                wanted = set(desired.placement.held_by(group))
                extra[group] = [pair for pair in await fleet.held(group) if pair not in wanted]

            failed = await _settle("ask", {g: ask(g) for g in fleet.alive(desired.groups)}, HELD_SECONDS)
        steps = {g: fleet.free(g, pairs) for g, pairs in extra.items() if g in desired.groups and pairs}
        failed |= await _settle("free", steps, STEP_SECONDS)
        self._leftovers = bool(fleet.alive(failed))
        return failed

    async def _let_go(self, desired: Desired) -> dict[str, str]:
        """Drain and end shards that are not desired, and end such groups. As _settle."""
        fleet = self._fleet
        shards = [s for s in fleet.shard_names() if s not in desired.shards]
        failed = await _settle("drain", {s: self._drain(s) for s in shards}, None)
        return failed | await self._end(shards + [g for g in fleet.group_names() if g not in desired.groups])

    async def _drain(self, shard: str) -> None:
        """Wait until a shard has finished its requests, but not while a worker is lost: what the shard waits for may be
        what the recovery brings. It gives them back then, where it can do that at once, and others go on with them."""
        draining = asyncio.ensure_future(self._fleet.leave_service(shard, DRAIN_SECONDS))
        lost = asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait([draining, lost], return_when=asyncio.FIRST_COMPLETED)
            if draining.done():
                draining.result()
            else:
                log.warning("%s is not drained any longer: a worker was lost", shard)
                await within(GIVE_BACK_SECONDS, self._fleet.leave_service(shard, 0.0))
        finally:
            draining.cancel()
            lost.cancel()
            await asyncio.wait([draining, lost])

    async def _end(self, workers: Sequence[str]) -> dict[str, str]:
        """End those of the workers that there are, which needs nobody's consent; shards that stay close their links to
        them before, where they can. As _settle."""
        fleet = self._fleet
        failed = await _settle("end", {s: fleet.end(s) for s in fleet.shard_names() if s in workers})
        groups = [g for g in fleet.group_names() if g in workers]
        stay = [s for s in fleet.alive(fleet.shard_names()) if s not in workers]
        links = {f"{s} to {g}": fleet.disconnect(s, g) for s in stay for g in groups}
        await _settle("disconnect", links, STEP_SECONDS)
        return failed | await _settle("end", {g: fleet.end(g) for g in groups})

    async def _end_strays(self) -> None:
        """End what a roll-back could not, nor a controller that has taken over. Where that fails again they stay, and
        are in nobody's way: nothing that was committed names them, and they are asked for nothing."""
        desired, fleet = self.desired, self._fleet
        await self._end(
            [w for w in fleet.group_names() + fleet.shard_names() if w not in desired.groups + desired.shards]
        )

    async def _roll_back(self, operation: Operation, undo: _Undo, reason: str) -> None:
        """Each step by itself, for whatever is left would stand in the way of every operation after this one."""
        self.enter(operation, Phase.ROLLING_BACK, reason)
        fleet = self._fleet
        fleet.avoid = self.desired.drained
        # A shard may have adopted the new placement already: it must leave it before anything is freed.
        stay = fleet.alive(self.desired.shards)
        failed = await _settle("adopt", {s: fleet.adopt(s, fleet.placement) for s in stay})
        failed = {s: failed[s] for s in fleet.alive(failed)}
        unfreed: dict[str, str] = {}
        if failed:
            self._leftovers = bool(undo.loads) or self._leftovers
        else:
            steps = {group: fleet.free(group, pairs) for group, pairs in undo.loads}
            unfreed = await _settle("free", steps, STEP_SECONDS)
        if unfreed:
            self._leftovers = True
            operation.reasons.append(f"not everything was freed: {_words(unfreed)}")
        failed |= await self._end(undo.workers)
        if failed:
            self.enter(operation, Phase.FAILED, f"roll-back failed: {_words(failed)}")
        else:
            self.enter(operation, Phase.ROLLED_BACK)


async def adopted(work: Awaitable[None]) -> None:
    """Wait until workers have taken up what is committed; an operation's own time is another. Raises OperationError
    when the time for this is over."""
    try:
        await within(COMMIT_SECONDS, work)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise OperationError(f"it was prepared, but not taken up within {COMMIT_SECONDS:g} s") from None


async def _settle(
    what: str, steps: Mapping[str, Awaitable[None]], seconds: float | None = COMMIT_SECONDS
) -> dict[str, str]:
    """Do a step with every worker, each by itself and within so many seconds; worker → why it failed."""
    limited = [asyncio.wait_for(step, seconds) for step in steps.values()]
    results = await asyncio.gather(*limited, return_exceptions=True)
    failed = {}
    for name, result in zip(steps, results, strict=True):
        if isinstance(result, BaseException):
            log.error("could not %s %s", what, name, exc_info=result)
            late = isinstance(result, asyncio.TimeoutError) and seconds is not None
            failed[name] = f"{what}: " + (f"not within {seconds:g} s" if late else named_line(result))
    return failed


def _words(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in failed.items())


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Wait for everything, then raise the first error, so that nothing goes on behind the caller's back."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def reason_of(error: Exception, seconds: float) -> str:
    """Why an operation fails that had so many seconds."""
    if isinstance(error, asyncio.TimeoutError):
        return ": ".join(filter(None, [f"not within {seconds:g} s, its deadline", str(error)]))
    return named_line(error)
