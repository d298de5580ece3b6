"""Has failed links between shards and groups made anew; where that does not help, says whom to replace. Knows nothing
about Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from isotherm.cluster.background import Background
from isotherm.cluster.errors import one_line
from isotherm.cluster.messages.workers import LinkFailure
from isotherm.cluster.within import within

log = logging.getLogger(__name__)
ANSWER_SECONDS = 4.0  # in which a group whose link has failed gives a sign of life
# In which a link must be there again. A meeting takes a dozen round trips: on a line of 200 ms that loses a packet in
# twenty up to 8 s, and replacing the group would take longer.
RELINK_SECONDS = 9.0
# Links of one group that fail in so many seconds, though all could be made anew: the group is at fault. One that
# answers each message with an error gets there in seconds; a bad line, where each failure is a silence first, does not.
OFTEN, SPAN = 5, 60.0
LOOK = 0.05  # seconds between two looks at what becomes of a shard's other links
LinkName = tuple[str, str]  # shard, group


class LinkedFleet(Protocol):
    """What a repair needs of the workers."""

    def is_there(self, worker: str) -> bool:
        """It has not been lost or ended."""

    def groups_of(self, shard: str) -> Iterable[str]:
        """The groups that a shard routes to: those of the placement that is in force. It may have links to others, and
        no rows have gone over them."""

    async def answers(self, worker: str) -> None:
        """Return when the worker has given a sign of life."""

    async def relink(self, shard: str, group: str) -> None:
        """Make a link in the place of one that has failed."""


class LinkRepair:
    """`lost` is told a worker that has to be replaced and why. `changed` is called when `failed` has changed."""

    def __init__(
        self,
        fleet: LinkedFleet,
        lost: Callable[[str, str], None],
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.failed: dict[LinkName, str] = {}  # links that are of no use now → why
        self.results: Counter[str] = Counter(made_anew=0, given_up=0)  # what became of repairs, ever
        self._numbers: dict[LinkName, int] = {}  # of them
        self._under_way: set[tuple[str, str, int]] = set()  # those of them that are being made anew, and their number
        self._hopeless: set[LinkName] = set()  # ... and that could not be
        self._fleet, self._lost, self._changed, self._clock = fleet, lost, changed, clock
        self._failures: dict[str, deque[float]] = {}  # group → when links to it failed
        self._tasks = Background()

    def report(self, shard: str, failed: Mapping[str, LinkFailure]) -> None:
        """Take which links of a shard have failed, by group; all others are whole. One with a number that is not known
        was made anew, and has failed again before the shard was asked."""
        before = {group: number for (of, group), number in self._numbers.items() if of == shard}
        now = {group: failure.number for group, failure in failed.items()}
        for group in [group for group, number in before.items() if now.get(group) != number]:
            self._forget((shard, group))
        for group in [group for group, number in now.items() if before.get(group) != number]:
            failure, pair = failed[group], (shard, group)
            self.failed[pair], self._numbers[pair] = failure.reason, failure.number
            log.warning("the link from %s to %s has failed: %s", shard, group, failure.reason)
            work = self._repair(shard, group, failure)
            self._tasks.spawn(f"the repair of the link from {shard} to {group}", work)
        if before != now:
            self._changed()

    def forget(self, worker: str) -> None:
        """A worker has been lost or ended, and its links with it."""
        for pair in [pair for pair in self.failed if worker in pair]:
            self._forget(pair)
        self._failures.pop(worker, None)

    def unreachable(self, shard: str) -> set[str]:
        """Groups that a shard cannot reach now."""
        return {group for of, group in self.failed if of == shard}

    def close(self) -> None:
        self._tasks.cancel()

    def _forget(self, pair: LinkName) -> None:
        self.failed.pop(pair, None)
        self._numbers.pop(pair, None)
        self._hopeless.discard(pair)

    async def _repair(self, shard: str, group: str, failure: LinkFailure) -> None:
        if self._fails_often(group):
            last = failure.reason
            self._replace(group, f"links to it have failed {OFTEN} times in {SPAN:g} s, the last one with: {last}")
            return
        self._under_way.add((shard, group, failure.number))
        try:
            at_fault = await self._make_anew(shard, group, failure.number)
        finally:
            self._under_way.discard((shard, group, failure.number))
        if at_fault is not None:
            self._replace(*at_fault)
            return
        # That it is whole, the shard reports; and it knows of what has failed since.
        log.info("the link from %s to %s has been made anew", shard, group)
        self.results["made_anew"] += 1

    async def _make_anew(self, shard: str, group: str, number: int) -> tuple[str, str] | None:
        """None, or who is at fault and why."""
        try:
            await within(ANSWER_SECONDS, self._fleet.answers(group))
        except Exception as error:
            return group, f"its link to {shard} has failed, and it gives no sign of life: {one_line(error)}"
        try:
            await within(RELINK_SECONDS, self._fleet.relink(shard, group))
            return None
        except Exception as error:
            reason = f"the link from {shard} to {group} has failed and cannot be made anew: {one_line(error)}"
        if self._numbers.get((shard, group)) != number and self._fleet.is_there(shard) and self._fleet.is_there(group):
            return None  # the shard has it all the same; where that one fails it says so, or has done so
        self._under_way.discard((shard, group, number))
        self._hopeless.add((shard, group))
        while any(of == shard for of, _, _ in self._under_way):  # what becomes of its other links tells more
            await asyncio.sleep(LOOK)
        return self._at_fault(shard, group), reason

    def _fails_often(self, group: str) -> bool:
        """Counts one more failure."""
        times, now = self._failures.setdefault(group, deque(maxlen=OFTEN)), self._clock()
        times.append(now)
        return len(times) == OFTEN and times[0] > now - SPAN

    def _at_fault(self, shard: str, group: str) -> str:
        """The shard, where none of its several links can be made anew and so all groups would have to go; else the
        group."""
        if not self._fleet.is_there(shard):
            return shard
        there = {g for g in self._fleet.groups_of(shard) if self._fleet.is_there(g)}
        return shard if len(there) > 1 and all((shard, g) in self._hopeless for g in there) else group

    def _replace(self, worker: str, reason: str) -> None:
        self.results["given_up"] += 1
        if self._fleet.is_there(worker):
            self._lost(worker, reason)
