"""Starts a cluster from nothing, or leaves nothing. Knows nothing about Ray: the workers are a `Fleet`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from isotherm.cluster.background import pauses
from isotherm.cluster.control.fleet import Fleet
from isotherm.cluster.errors import named_line
from isotherm.cluster.placement.table import Placement

log = logging.getLogger(__name__)
PLACES_SECONDS = 3.0  # in which workers find places where there are any
PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds before a start that failed is tried again: at first, and at most
LOSSES = 2  # starts in which a worker was lost, after which one more is tried also for somebody who waits for it


class StartableFleet(Fleet, Protocol):
    async def end_all(self) -> None:
        """End every worker, and give back every place."""


async def start_fleet(
    fleet: StartableFleet,
    shards: Sequence[str],
    groups: Sequence[str],
    placement: Placement,
    phase: Callable[[str], None],
) -> None:
    """Start every worker, load weights in parallel, make the links and have the shards adopt the first placement.
    Raises what went wrong first, when every worker that was started has been ended. `phase` is told what is being done.
    """
    work: list[asyncio.Task[Any]] = []

    def begin(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        work.append(asyncio.ensure_future(coroutine))
        return work[-1]

    async def start_shard(name: str) -> None:
        await places[name]
        await fleet.start_shard(name)

    async def start_group(name: str) -> None:
        await places[name]
        await fleet.start_group(name)
        await fleet.load(name, placement.held_by(name))

    try:
        places = {name: begin(fleet.reserve(name, fleet.avoid)) for name in (*shards, *groups)}
        # Groups that know of one another share their node's cores; one that has no place yet need not keep others
        # waiting.
        await asyncio.wait(places.values(), timeout=PLACES_SECONDS)
        await asyncio.gather(*(begin(start_shard(s)) for s in shards), *(begin(start_group(g)) for g in groups))
        phase("linking workers")
        await asyncio.gather(*(begin(fleet.link(s, g)) for s in shards for g in groups))
        await asyncio.gather(*(begin(fleet.adopt(s, placement)) for s in shards))
    except BaseException:
        for task in work:  # gather leaves the others going
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        try:
            await fleet.end_all()
        except Exception:
            log.exception("could not end the workers of a start that failed")
        raise


async def start_again_and_again(
    attempt: Callable[[], Awaitable[None]],
    phase: Callable[[str], None],
    retry: bool,
    lost: Callable[[Exception], bool] = lambda _: False,
) -> None:
    """Attempt a start; where it fails and `retry` is set, again, ever more slowly, until it succeeds. Else raises what
    went wrong, but what is a worker's loss by `lost` not before it has come LOSSES times and once more. The phase says
    why there is no cluster yet."""
    losses = 0
    for pause in pauses(PAUSE, LONGEST_PAUSE):
        phase("starting workers")
        try:
            return await attempt()
        except Exception as error:
            why = f"start failed: {named_line(error)}"
            losses += lost(error)
            if not retry and (not lost(error) or losses > LOSSES):
                phase(why)
                raise
            log.exception("start failed; tried again in %g s", pause)
            phase(f"{why}; tried again in {pause:g} s")
        await asyncio.sleep(pause)
