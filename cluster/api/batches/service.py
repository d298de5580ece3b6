"""The batches of one ingress replica: takes those that nobody runs, its own and those of replicas that have died, and
runs them in the application that serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from starlette.types import ASGIApp

from isotherm.cluster.api.batches.in_process import ask
from isotherm.cluster.api.batches.retries import Retries
from isotherm.cluster.api.batches.runner import BatchRun, Places, RunSettings
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.batches.stored import owner_of
from isotherm.cluster.background import Background
from isotherm.cluster.errors import named_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.within import within

log = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0  # from one look for batches that nobody runs to the next
_SWEEP_SECONDS = 60.0
PRIORITY = 1_000_000  # of rows that say none: behind everything that people wait for
_AT_ONCE = 4  # batches of one key that one replica runs; others wait
_ENDING_AT_ONCE = 16  # batches that are cancelled or past their window: they wait for none of those
_ENDING = None  # who has them run, instead of the key's name
_TRIES = 3  # of a batch whose running fails for a reason that is not in its rows
MOST_WAITING = 100  # batches that are told of: all that there are, where the disk is full
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
        self._running: dict[str, str | None] = {}  # for which key
        self._over: set[str] = set()  # batches that have been seen to be
        self._waiting: list[JSON] = []
        self._retries = Retries(lambda: asyncio.get_running_loop().time())
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

    def waiting(self) -> list[JSON]:
        """The batches that do not get on for want of storage, as of the last look: `id`, and `code` and `message` as
        their clients see them; MOST_WAITING of them at most."""
        return self._waiting

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
            found = await asyncio.to_thread(self._unfinished)
            ids = {batch["id"] for batch, _ in found}
            self._retries.keep(ids)
            self._over &= ids
            for batch, is_over in found:
                if is_over:
                    self._forget_failures(batch["id"])
                self._take(batch["id"], _ENDING if is_over else owner_of(batch))
            if clock() - swept > _SWEEP_SECONDS:
                swept = clock()
                await asyncio.to_thread(self.store.sweep)
            with contextlib.suppress(TimeoutError):
                await within(_LOOK_SECONDS, self._wake.wait())

    def _unfinished(self) -> list[tuple[JSON, bool]]:
        """And whether there is nothing left to do but to end them."""
        found = self.store.unfinished()
        waiting = islice(self.store.waiting(found).items(), MOST_WAITING)
        self._waiting = [{"id": name, "code": why.code, "message": why.message} for name, why in waiting]
        return [(batch, self.store.over(batch) is not None) for batch in found]

    def _forget_failures(self, batch_id: str) -> None:
        """Once, where a batch is over: what has failed before was something else than its end."""
        if batch_id not in self._over:
            self._over.add(batch_id)
            self._retries.forget(batch_id)

    def _take(self, batch_id: str, whose: str | None) -> None:
        if batch_id in self._running or not self._retries.is_due(batch_id):
            return
        if list(self._running.values()).count(whose) < (_ENDING_AT_ONCE if whose is _ENDING else _AT_ONCE):
            self._running[batch_id] = whose
            self._background.spawn(f"batch {batch_id}", self._run(batch_id))

    async def _run(self, batch_id: str) -> None:
        try:
            with self.store.lock(batch_id) as held:
                if held:
                    await self._run_held(self.store.stored(batch_id))
                else:  # another replica gets on with it
                    self.store.waits_no_more(batch_id)
        except OSError as error:  # of the lock, or of giving the batch up
            self._waits(batch_id, error)
            self._retries.failed(batch_id, counts=False)
        finally:
            del self._running[batch_id]

    def _waits(self, batch_id: str, error: OSError) -> None:
        log.warning("batch %s waits, for it cannot be written or read: %s", batch_id, named_line(error))
        self.store.waits(batch_id, error)

    async def _run_held(self, batch: JSON) -> None:
        settings = RunSettings(self._max_body_bytes, self._places, self._limit())
        run = BatchRun(self.store, batch, partial(ask, self._app, PRIORITY, owner_of(batch)), settings)
        try:
            await run.run()
        except Exception as error:
            if run.written:
                self._retries.forget(batch["id"])
            # A disk that is full, or away, is waited for as long as the batch has time. A file that is gone stays so.
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                self._waits(batch["id"], error)
                counts = self.store.clock() >= batch["expires_at"]
            else:
                log.exception("batch %s stopped", batch["id"])
                counts = True
            if self._retries.failed(batch["id"], counts) >= _TRIES:
                await run.give_up(f"it stopped {_TRIES} times; the last time: {named_line(error)}")

    def _limit(self) -> int:
        return max(1, min(self.limits.concurrency, self._capacity() // _SHARE))
