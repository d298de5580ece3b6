"""The one way to run something in the background: nothing that does may end without a word. Knows nothing about what is
run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds before work that has failed begins anew
SOUND_SECONDS = 60.0  # work that has gone on for so long begins anew after the first pause again


def pauses(first: float, longest: float) -> Iterator[float]:
    """Seconds to wait before what has failed is tried again, for ever: each twice the one before it, up to
    the longest."""
    pause = first
    while True:
        yield min(pause, longest)
        pause = min(2 * pause, longest)


class Background:
    """The tasks of one owner, on the event loop that runs when they are spawned. An error in one is logged with its
    traceback, and `failed` is told its name and the error."""

    def __init__(self, failed: Callable[[str, BaseException], None] = lambda name, error: None):
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` once."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run `work` until it returns; where it raises it is begun anew, after a pause that grows with each failure in
        succession."""
        return self.spawn(name, self._keep(name, work))

    async def _keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        clock, waits = asyncio.get_running_loop().time, pauses(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            begin = clock()
            try:
                return await work()
            except Exception as error:
                if clock() - begin > SOUND_SECONDS:
                    waits = pauses(FIRST_PAUSE, LONGEST_PAUSE)
                pause = next(waits)
                log.exception("%s failed; it begins anew in %g s", name, pause)
                self._failed(name, error)
            await asyncio.sleep(pause)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            self._failed(task.get_name(), error)

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._tasks)

    def cancel(self) -> None:
        """Cancel everything."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel everything, and return when it has ended."""
        tasks = list(self._tasks)
        self.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def spawn_thread(name: str, work: Callable[[], None], vital: bool = True) -> threading.Thread:
    """Run `work` in a daemon thread, which the system too knows by its name. An error is logged with its traceback;
    where the thread is vital the process ends then, so that whoever watches it learns of it and replaces it."""

    def run() -> None:
        _tell_system(name)
        try:
            work()
        except BaseException:
            log.exception("thread %s failed%s", name, "; this process ends" if vital else "")
            if vital:
                logging.shutdown()
                os._exit(1)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def _tell_system(name: str) -> None:
    """Name the calling thread as `top -H`, debuggers and tests see it, by up to 15 bytes; Python tells the system only
    from 3.14 on."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes(name.encode()[:15])
