"""The batches of one ingress replica: takes those that nobody runs, its own and those of replicas that have died, and
runs them in the application that serves."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from starlette.types import ASGIApp

from isotherm.cluster.api.batches.in_process import ask
from isotherm.cluster.api.batches.runner import BatchRun, Places, RunSettings, failed
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.batches.stored import owner_of
from isotherm.cluster.background import Background
from isotherm.cluster.errors import named_line

log = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0  # from one look for batches that nobody runs to the next
_SWEEP_SECONDS = 60.0
PRIORITY = 1_000_000  # of rows that say none: behind everything that people wait for
_AT_ONCE = 4  # batches that one replica runs; others wait
_TRIES = 3  # of a batch whose running fails for a reason that is not in its rows
_SHARE = 4  # rows take at most this part of the places for requests: the others are for people


@dataclass(frozen=True)
class BatchLimits:
    """What one batch, and all of them together, may take."""

    max_file_bytes: int = 200 << 20
    concurrency: int = 32  # rows asked at once by one replica


class BatchService:
    """Of one replica."""

    def __init__(self, store: Store, limits: BatchLimits, max_body_bytes: int) -> None:
        self.store, self.limits = store, limits
        self._max_body_bytes = max_body_bytes
        self._running: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._background = Background()
        self._begun = False
        self._wake: asyncio.Event | None = None

    def serve_with(self, app: ASGIApp, capacity: Callable[[], int]) -> None:
        """Rows are asked of `app`; `capacity` is how many requests it takes at once."""
        self._app, self._capacity = app, capacity
        self._places = Places(self._limit)

    def begin(self) -> None:
        """Look for batches, on the event loop that runs; once."""
        if not self._begun:
            self._begun = True
            self._wake = asyncio.Event()
            self._background.keep("the batches", self._look)

    def added(self) -> None:
        """A batch was added: look at once."""
        self.begin()
        assert self._wake is not None
        self._wake.set()

    async def close(self) -> None:
        """End here, in the middle of whatever runs; another replica goes on with it."""
        await self._background.close()
        self._begun = False

    async def _look(self) -> None:
        clock = asyncio.get_running_loop().time
        swept = clock()
        assert self._wake is not None
        while True:
            self._wake.clear()
            for batch in await asyncio.to_thread(self.store.unfinished):
                self._take(batch["id"])
            if clock() - swept > _SWEEP_SECONDS:
                swept = clock()
                await asyncio.to_thread(self.store.sweep)
            try:
                await asyncio.wait_for(self._wake.wait(), _LOOK_SECONDS)
            except asyncio.TimeoutError:
                continue

    def _take(self, batch_id: str) -> None:
        if batch_id not in self._running and len(self._running) < _AT_ONCE:
            self._running.add(batch_id)
            self._background.spawn(f"batch {batch_id}", self._run(batch_id))

    async def _run(self, batch_id: str) -> None:
        try:
            with self.store.lock(batch_id) as held:
                if held:
                    await self._run_held(batch_id)
        finally:
            self._running.discard(batch_id)

    async def _run_held(self, batch_id: str) -> None:
        try:
            settings = RunSettings(self._max_body_bytes, self._places, self._limit())
            asked = partial(ask, self._app, PRIORITY, owner_of(self.store.stored(batch_id)))
            await BatchRun(self.store, batch_id, asked, settings).run()
        except Exception as error:
            log.exception("batch %s stopped", batch_id)
            self._failures[batch_id] += 1
            if self._failures[batch_id] >= _TRIES:
                failed(self.store, batch_id, f"it stopped {_TRIES} times; the last time: {named_line(error)}")

    def _limit(self) -> int:
        return max(1, min(self.limits.concurrency, self._capacity() // _SHARE))
