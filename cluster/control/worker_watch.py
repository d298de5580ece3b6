"""Watches over the workers of a cluster: who has died, who hangs, and whose links have failed. Knows nothing
about Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from isotherm.cluster.background import Background
from isotherm.cluster.control.liveness import SLICES, answers_within
from isotherm.cluster.errors import one_line
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.workers import LinkFailure
from isotherm.cluster.within import within

log = logging.getLogger(__name__)

WAKING = 0.5  # seconds in which a worker that has waited for as long as it may goes on, and says so
LINKS_SECONDS = 45.0  # in which a shard says which of its links have failed, also where nothing has changed
LEAST = 0.01  # seconds that are worth waiting for


class Worker(Protocol):
    """A worker from afar."""

    @property
    def id(self) -> str: ...

    async def call(self, name: str, *args: Any) -> Any:
        """What one of its methods gives. Raises WorkerGoneError."""


class WorkerWatch:
    """`lost` is told a worker and how it was lost, and whether it hangs; `links_failed` a shard and its failed links,
    each time that they change. `limit`: seconds without a sign of life after which a worker hangs; 0: never. One that
    is `busy` need give none. `patience`: seconds that one may wait for another before it takes their link for failed.
    """

    def __init__(
        self,
        limit: float,
        busy: Callable[[str], bool],
        lost: Callable[[str, str, bool], None],
        links_failed: Callable[[str, Mapping[str, LinkFailure]], None],
        patience: float = 0.0,
    ):
        self._patience = patience
        self._limit, self._busy, self._lost, self._links_failed = limit, busy, lost, links_failed
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[str, Background] = {}

    def add(self, worker: Worker, has_links: bool) -> None:
        """Watch a worker until `remove`; `has_links`: an attention shard, which knows of its links."""
        tasks = self._tasks[worker.id] = Background()
        self._workers[worker.id] = worker
        tasks.keep(f"the sentinel of {worker.id}", lambda: self._await_death(worker))
        if self._limit:
            tasks.keep(f"the watch over {worker.id}", lambda: self._ask_again_and_again(worker))
        if has_links:
            tasks.keep(f"the watch over the links of {worker.id}", lambda: self._follow_links(worker))

    def remove(self, name: str) -> None:
        self._workers.pop(name, None)
        if (tasks := self._tasks.pop(name, None)) is not None:
            tasks.cancel()

    async def _await_death(self, worker: Worker) -> None:
        try:
            await worker.call("sentinel")
        except WorkerGoneError as error:
            self._lost(worker.id, one_line(error), False)

    async def _ask_again_and_again(self, worker: Worker) -> None:
        """Ask for a sign of life now and then. The limit counts from the last one, not from the question."""
        clock, pause = asyncio.get_running_loop().time, self._limit / SLICES
        heard = clock()
        while True:
            begin = clock()
            await asyncio.sleep(pause)
            if self._busy(worker.id):
                heard = clock()
                continue
            if clock() > begin + 2 * pause:  # this process has stood still itself, and can blame nobody
                heard = clock()
            left = max(pause, heard + self._limit - clock())
            while not await answers_within(answer := asyncio.ensure_future(worker.call("sign_of_life")), left):
                if self._busy(worker.id):
                    break
                left = await self._may_wait(worker)
                if left < LEAST:
                    self._lost(worker.id, f"it hangs: no sign of life in {self._limit:g} s", True)
                    return
            else:
                if isinstance(answer.exception(), WorkerGoneError):
                    return  # the sentinel says so
                answer.result()
            heard = clock()

    async def _may_wait(self, worker: Worker) -> float:
        """For how many seconds a worker that does not go on may stay so; 0: it hangs itself. Where it waits for another
        one that does not answer, that one is to blame; where for one that is well, their link is, but no longer than it
        may wait for an answer."""
        asked = asyncio.ensure_future(worker.call("waits_for"))
        if not await answers_within(asked, self._limit / SLICES) or asked.exception() is not None:
            return 0.0
        name, seconds = asked.result()
        if not name:
            return 0.0
        whom = self._workers.get(name)
        if whom is None:  # found dead meanwhile: the loss of their link wakes this one, if anything can
            return float(self._patience + self._limit - seconds)
        answer = asyncio.ensure_future(whom.call("sign_of_life"))
        well = await answers_within(answer, self._limit) and answer.exception() is None
        says = "is well" if well else "does not answer"
        log.warning("%s has waited for %s for %.1f s, which %s", worker.id, whom.id, seconds, says)
        return float(self._patience + WAKING - seconds) if well else self._limit

    async def _follow_links(self, shard: Worker) -> None:
        known = -1
        while True:
            try:
                version, failed = await within(LINKS_SECONDS, shard.call("failed_links", known))
            except TimeoutError:
                log.warning(
                    "%s has not said in %g s which links have failed; it is asked again", shard.id, LINKS_SECONDS
                )
                continue
            except WorkerGoneError:
                return
            if version != known:
                known = version
                self._links_failed(shard.id, failed)
