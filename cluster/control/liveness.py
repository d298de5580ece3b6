"""Who hangs: asked for a sign of life, it gives none. A process that is stopped, or whose event loop is blocked, has
not died: its connections stay open, and nobody else would notice.

The controller watches the workers (cluster/deploy/fleet.py); ingress replicas watch the controller with
`watch_controller`. Knows nothing about Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any, Protocol

from isotherm.cluster.errors import named_line

log = logging.getLogger(__name__)
SLICES = 4  # looks per time limit


async def done_within(answer: asyncio.Future[Any], limit: float) -> bool:
    """Whether `answer` is done, also with an error, in `limit` seconds. Waits in slices, of which this process's own
    standing still takes up one at most."""
    for _ in range(SLICES):
        await asyncio.wait([answer], timeout=limit / SLICES)
    return answer.done()


def let_go(answer: asyncio.Future[Any]) -> None:
    """Cancels what nobody waits for any more. Where it is done already its error is taken note of, which Python
    complains of else."""
    if not answer.cancel() and not answer.cancelled():
        answer.exception()


async def answers_within(answer: asyncio.Future[Any], limit: float) -> bool:
    """As `done_within`; what is not done, or is waited for no more, is cancelled."""
    is_done = False
    try:
        is_done = await done_within(answer, limit)
    finally:
        if not is_done:
            let_go(answer)
    return is_done


class Watched(Protocol):
    """A controller as its watchers see it. Every method raises where Ray's head cannot be reached."""

    async def incarnation(self) -> str | None:
        """Tells the process that is the controller now from those before it; None while there is none, and while Ray
        starts one."""

    async def answer(self) -> None:
        """Return when its event loop has answered."""

    async def claim(self, incarnation: str, attempt: int) -> bool:
        """Whether this watcher is the first, of all, to ask for this attempt at this incarnation."""

    async def kill(self) -> None:
        """Kill the process; Ray starts it again."""


async def watch_controller(controller: Watched, limit: float) -> None:
    """Have a controller killed that gives no sign of life in `limit` seconds, as long as this is not cancelled. Several
    watchers may run: one of them kills, and only the process that was silent; one that Ray is still starting is let
    alone. So is one while Ray's head takes its time to answer: whoever asks it something then waits as well."""
    clock, attempts = asyncio.get_running_loop().time, Counter[str]()
    while True:
        await asyncio.sleep(limit / SLICES)
        try:
            asked = await controller.incarnation()
            if asked is None:
                continue
            answer = asyncio.ensure_future(controller.answer())
            if await answers_within(answer, limit):
                answer.result()
                continue
            begin = clock()
            if await controller.incarnation() != asked or clock() - begin > limit / SLICES:
                continue
            attempts[asked] += 1
            if await controller.claim(asked, attempts[asked]):
                log.error("the controller hangs: no answer in %g s; it is killed, and started again", limit)
                await controller.kill()
        except Exception as error:
            log.warning("cannot look after the controller: %s", named_line(error))
