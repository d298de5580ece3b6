"""Watches over the ingress replicas: one that stands still is killed, so that another takes its place. Ray Serve gives
a replica that does not answer half a minute, and with a single one nobody answers meanwhile. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from isotherm.cluster.background import Background
from isotherm.cluster.control.liveness import answers_within, done_within, let_go
from isotherm.cluster.errors import one_line
from isotherm.cluster.messages.membership import WorkerGoneError

log = logging.getLogger(__name__)
STANDING_SECONDS = 3.0  # in which some thread of a process that runs has answered
FIRST_SECONDS = 15.0  # for the first answer to this process, whose connection must be made before
PAUSE = 0.5  # seconds from one answer to the next question


class Replica(Protocol):
    """An ingress replica from afar. Raises WorkerGoneError where it has ended."""

    async def reach(self) -> None:
        """Return when it can be asked. That is Ray's head's work, and says nothing of the replica."""

    async def answer(self) -> None:
        """Return when the event loop that serves requests has answered."""

    async def stir(self) -> None:
        """Return when any thread of its process has answered."""

    async def kill(self) -> None: ...


class IngressWatch:
    """`find` gives a replica by the name that it reports by. `limit`: seconds without an answer of its event loop after
    which a replica hangs; where no thread of it answers either, STANDING_SECONDS are enough, once it has answered. 0:
    nobody is watched."""

    def __init__(self, background: Background, find: Callable[[str], Replica], limit: float) -> None:
        self._background, self._find, self._limit = background, find, limit
        self._watched: set[str] = set()
        self.killed: list[str] = []  # by their names: Ray tells them from those that Serve itself ends by nothing

    def follow(self, name: str) -> None:
        """Watch a replica that has just reported, until it has ended."""
        if self._limit and name not in self._watched:
            self._watched.add(name)
            self._background.keep(f"the watch over {name}", lambda: self._watch(name))

    async def _watch(self, name: str) -> None:
        replica = self._find(name)
        try:
            await replica.reach()
            silence = await self._first_silence(replica)
            while silence is None:
                await asyncio.sleep(PAUSE)
                silence = await self._silence(replica)
            log.error("%s %s; it is killed, and Ray Serve starts another", name, silence)
            self.killed.append(name)  # before it is: who sees it gone then learns why
            await replica.kill()
        except WorkerGoneError as error:
            log.info("%s has ended: %s", name, one_line(error))
        self._watched.discard(name)

    async def _first_silence(self, replica: Replica) -> str | None:
        """As `_silence`, of one whose answers have not reached this process yet."""
        seconds = max(self._limit, FIRST_SECONDS)
        answer = asyncio.ensure_future(replica.answer())
        if not await answers_within(answer, seconds):
            return f"hangs: it has not given a first answer in {seconds:g} s"
        answer.result()
        return None

    async def _silence(self, replica: Replica) -> str | None:
        """None as soon as it answers; else how it is silent."""
        answer, stir = asyncio.ensure_future(replica.answer()), asyncio.ensure_future(replica.stir())
        try:
            if not await done_within(answer, min(STANDING_SECONDS, self._limit)):
                if not stir.done():
                    return f"stands still: no thread of it has answered in {min(STANDING_SECONDS, self._limit):g} s"
                if not await answers_within(answer, max(self._limit - STANDING_SECONDS, 0.0)):
                    return f"hangs: its event loop has not answered in {self._limit:g} s"
            answer.result()
            return None
        finally:
            for asked in (answer, stir):
                let_go(asked)
