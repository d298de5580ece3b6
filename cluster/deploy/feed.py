"""The controller's event stream: keeps a table of what there is to tell, and has listeners wait for what is new.

Workers are asked only while somebody listens. What their meters say, which the autoscaler reads anyway, is kept for the
last minutes, so that whoever comes sees them."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Set
from typing import Protocol

from isotherm.cluster.autoscale.loop import AutoscaleLoop
from isotherm.cluster.background import Background
from isotherm.cluster.errors import named_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.feed import FeedPart, FeedTable
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.observe.rows import (
    Rows,
    autoscaler_rows,
    heat_rows,
    operation_rows,
    placement_rows,
    sample_rows,
    status_rows,
)
from isotherm.cluster.observe.traffic import Traffic
from isotherm.cluster.placement.table import Placement

log = logging.getLogger(__name__)
PERIOD = 1.0  # seconds between two looks while somebody listens
WAIT = 20.0  # seconds after which a listener who waits is told that there is nothing new
HEARD = 30.0  # seconds after its last question for which a listener counts


class FedFleet(Protocol):
    """What is told of the fleet without asking the workers."""

    @property
    def placement(self) -> Placement: ...

    def group_names(self) -> list[str]: ...


class ClusterFeed:
    """`status`: what `Controller.status` gives, `operations` what `operation_history` does; `pinned`: experts whose
    copies an operator has set."""

    def __init__(
        self,
        fleet: FedFleet,
        autoscale: AutoscaleLoop,
        status: Callable[[], Awaitable[JSON]],
        operations: Callable[[], list[JSON]],
        pinned: Callable[[], Set[tuple[int, int]]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._fleet, self._autoscale, self._clock = fleet, autoscale, clock
        self._status, self._operations, self._pinned = status, operations, pinned
        self._table = FeedTable(uuid.uuid4().hex[:12])
        self._traffic = Traffic()
        self._asked = float("-inf")
        self._changed = asyncio.Event()
        self._looked = asyncio.Event()  # since somebody listens again
        self._failure: Exception | None = None  # of the last look
        self._background = Background()
        self._looking: asyncio.Task[None] | None = None  # while somebody listens
        autoscale.metered = self._meter

    async def part(self, last: str) -> FeedPart | None:
        """What is new since the part whose id is `last`; waits for it, and gives None where nothing comes. Raises
        WorkerGoneError while the cluster cannot be looked at: what is known of it may hold no more."""
        self._asked = self._clock()
        if self._looking is None or self._looking.done():
            self._looked.clear()
            self._looking = self._background.keep("looking for listeners", self._look_on)
        try:
            return await asyncio.wait_for(self._next(last), WAIT)
        except asyncio.TimeoutError:
            return None

    async def _next(self, last: str) -> FeedPart:
        await self._looked.wait()
        while self._failure is None:
            if (part := self._table.since(last)) is not None:
                return part
            await self._changed.wait()
        raise WorkerGoneError(f"the cluster cannot be looked at: {named_line(self._failure)}")

    def tell(self) -> None:
        """Operations or the placement have changed."""
        if self._looking is not None and not self._looking.done():
            self._put(self._known())

    def _meter(self, shards: Mapping[str, ShardMeter], groups: Mapping[str, GroupMeter], now: float) -> None:
        self._traffic.observe(shards, groups, self._fleet.placement, now, time.time())

    async def _look_on(self) -> None:
        while self._clock() - self._asked < HEARD:
            await self._try_to_look()
            self._looked.set()
            await asyncio.sleep(PERIOD)

    async def _try_to_look(self) -> None:
        try:
            await self._look()
        except Exception as error:  # of Ray's, whose head may be away
            if self._failure is None:
                log.exception("cannot look at the cluster for those who listen; tried again every %g s", PERIOD)
            self._failure = error
            self._wake()
        else:
            self._failure = None

    async def _look(self) -> None:
        status = await self._status()
        groups, shards = self._autoscale.told_loads()
        self._put(status_rows(status, [*groups, *shards]) | self._known())

    def _known(self) -> Rows:
        """What needs no question to a worker."""
        placement, traffic = self._fleet.placement, self._traffic
        groups, rates = self._fleet.group_names(), self._autoscale.rates()
        return {
            **placement_rows(placement, self._pinned()),
            **heat_rows(placement, groups, rates, traffic.rows_LE, traffic.flows),
            **operation_rows(self._operations()),
            **autoscaler_rows(self._autoscale.report()),
            **sample_rows(traffic.samples),
        }

    def _put(self, rows: Rows) -> None:
        before = self._table.version
        for prefix, values in rows.items():
            if "" in values:
                self._table.put(prefix, values[""])
            else:
                self._table.replace(prefix, values)
        if self._table.version != before:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
