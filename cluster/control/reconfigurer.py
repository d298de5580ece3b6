"""What is asked of a cluster, and by whom: operations of its operator, moves and sizes of the autoscaler, and its own
recovery when workers die. Each is planned here and carried out as a transaction (cluster/control/transactions.py)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from isotherm.cluster.background import Background, pauses
from isotherm.cluster.control.fleet import Fleet
from isotherm.cluster.control.planner import Desired, Planner
from isotherm.cluster.control.transactions import Transactions
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import (
    AUTOSCALER,
    OPERATOR,
    RECOVERY,
    Operation,
    OperationError,
    OperationLog,
    OperationRequest,
    Origin,
    Phase,
    Target,
)
from isotherm.cluster.placement.table import Placement
from isotherm.cluster.within import within

RECOVERY_SECONDS = 60.0  # in which the workers that replace dead ones must be there
RESTORE_SECONDS = 120.0  # in which workers must be there that make up for some that were lost, while the others serve
# Seconds before dead workers that could not be replaced are replaced again: at first, and at most
HEAL_PAUSE, LONGEST_HEAL_PAUSE = 0.25, 30.0
ANOTHER_HEAL_PAUSE = 2.0  # the longest where another one is lost meanwhile
RESTORE_PAUSE, LONGEST_RESTORE_PAUSE = 1.0, 60.0  # likewise before the number of workers is restored


class Reconfigurer:
    """Decides nothing about load. `changed` and `save`: as Transactions says."""

    def __init__(
        self, fleet: Fleet, operations: OperationLog, changed: Callable[[], None], save: Callable[[], None]
    ) -> None:
        self._fleet, self._operations = fleet, operations
        self.planner = Planner(fleet)
        self.transactions = Transactions(fleet, self.planner, changed, save)
        self._healing = False
        self._background = Background()

    @property
    def desired(self) -> Desired:
        """What was committed last."""
        return self.transactions.desired

    @desired.setter
    def desired(self, desired: Desired) -> None:
        self.transactions.desired = desired

    def submit(self, request: OperationRequest, origin: Origin = OPERATOR) -> Operation:
        """Begin an operation; it goes on in the background. Raises OperationError, or PlacementChangeError for copies
        that cannot be: nothing has begun then, and nothing is recorded."""
        if (known := self._operations.known(request)) is not None:
            return known
        desired = self.planner.aim(self.desired, request.target)
        operation, _ = self.open(request, origin)
        operation.plan = self.planner.describe(self.desired, desired)
        if request.dry_run:
            self.transactions.enter(operation, Phase.DONE, "dry run: nothing was changed")
        else:
            plan = lambda names: self.planner.aim(self.desired, request.target, names)  # noqa: E731
            self._background.spawn(
                f"operation {operation.id}", self.transactions.run(operation, plan, request.deadline_seconds)
            )
        return operation

    def open(self, request: OperationRequest, origin: Origin = OPERATOR) -> tuple[Operation, bool]:
        """As OperationLog.open; what the autoscaler does gives way to an operator."""
        operation, new = self._operations.open(request, time.time(), origin)
        about_workers = request.target.about_workers
        if new and origin != AUTOSCALER and not request.dry_run:
            self.transactions.give_way(
                f"operation {operation.id} was asked for",
                lambda o: o.origin == AUTOSCALER and (about_workers or not o.waiting),
            )
        return operation, new

    def rebalance(self, placement: Placement, reason: str) -> Operation:
        """Begin a change of copies alone, decided by the autoscaler. Raises OperationError while another operation
        runs."""
        operation, _ = self._operations.open(
            OperationRequest(Target(), "", False, RECOVERY_SECONDS), time.time(), AUTOSCALER
        )
        operation.reasons.append(reason)
        before = self.desired
        operation.plan = self.planner.describe(before, replace(before, placement=placement))

        def plan(_: Sequence[str]) -> Desired:
            now = self.desired
            same = (now.groups, now.shards) == (before.groups, before.shards)
            if not same or now.placement.version + 1 != placement.version:
                raise OperationError("the cluster has changed since it was planned")
            return replace(now, placement=placement)

        self._background.spawn(f"operation {operation.id}", self.transactions.run(operation, plan, RECOVERY_SECONDS))
        return operation

    def pinned(self) -> frozenset[Pair]:
        """Experts whose number of copies an operator has set."""
        return self.desired.pinned

    async def ended(self, operation: Operation) -> Operation:
        """The operation when it has ended."""
        return await self.transactions.ended(operation)

    def heal(self) -> None:
        """Replace every worker that has died. An operation that still prepares ends: it may be waiting for resources,
        and the death comes first. Shards that are being drained give back what they have."""
        self.transactions.give_way("a worker was lost", lambda o: o.origin != RECOVERY)
        self.transactions.lost.set()
        if not self._healing:
            self._healing = True
            self._background.keep("healing", self._heal)

    def _dead(self) -> list[str]:
        workers = self._fleet.group_names() + self._fleet.shard_names()
        alive = set(self._fleet.alive(workers))
        return [worker for worker in workers if worker not in alive]

    async def _heal(self) -> None:
        """Goes on, ever more slowly, as long as there are dead ones. Afterwards there are to be as many workers as were
        committed before the first loss, or by somebody else's operation in between."""
        transactions, late = self.transactions, False
        wanted = left = (0, 0)
        for pause in pauses(HEAL_PAUSE, LONGEST_HEAL_PAUSE):
            async with transactions.turn:
                transactions.lost.clear()
                if self.desired.size != left:
                    wanted = self.desired.size
                if not (dead := self._dead()):
                    break
                operation = Operation(f"recovery-{int(time.time() * 1000)}", {"replace": dead}, RECOVERY, time.time())
                operation.entered[Phase.PLANNED.value] = operation.created
                self._operations.record(operation)
                # Where a replacement finds no place in time, the others take over what they can.
                anew = not late
                late = await transactions.transact(
                    operation,
                    lambda: self.planner.heal(self.desired, anew),  # noqa: B023
                    RECOVERY_SECONDS,
                )
                left = self.desired.size
            await asyncio.sleep(min(pause, ANOTHER_HEAL_PAUSE))
            with contextlib.suppress(TimeoutError):
                await within(pause - min(pause, ANOTHER_HEAL_PAUSE), transactions.lost.wait())
        self._healing = False
        if self.desired.size < wanted:
            self.restore(*wanted, "as many workers as before some were lost")

    def restore(self, groups: int, shards: int, reason: str) -> None:
        """Bring the number of workers back to what it was before some could not be had for want of a place. Gives way
        to an operator."""
        self._background.spawn("restoring the number of workers", self._restore(groups, shards, reason))

    async def _restore(self, groups: int, shards: int, reason: str) -> None:
        have = self.desired.size
        request = OperationRequest(
            Target(expert_groups=groups or None, attention_shards=shards), "", False, RESTORE_SECONDS
        )
        for pause in pauses(RESTORE_PAUSE, LONGEST_RESTORE_PAUSE):
            await asyncio.sleep(pause)
            if self._healing or have != self.desired.size:
                return
            try:
                operation = self.submit(request, AUTOSCALER)
            except OperationError:  # another one runs
                continue
            operation.reasons.append(reason)
            if (await self.ended(operation)).phase is Phase.DONE:
                return

    def take_over(self) -> None:
        """Begin with the workers of `desired`, which a controller before this one has left, and replace those of them
        that are dead; it goes on in the background. What cannot be done now is done later, and keeps nobody dead."""
        self._background.keep("taking over", self.transactions.take_over)
        if self._dead():
            self.heal()  # in its turn

    async def interrupt(self, why: str) -> None:
        """Roll back whatever has not been committed, for good; return when no operation is under way any more."""
        if ending := self.transactions.give_way(why, lambda _: True):
            await asyncio.wait(ending)
        await self._background.close()
