"""Says in the log when an event loop stood still, for whoever looks for why requests waited."""

from __future__ import annotations

import asyncio
import logging
import time

log = logging.getLogger(__name__)
PERIOD = 0.5  # seconds from one look to the next
LEAST_SECONDS = 1.0  # a standstill that is worth a line


async def keep_watch(period: float = PERIOD, least: float = LEAST_SECONDS) -> None:
    """Of the event loop that it runs on, for ever: a warning after each standstill of at least so many seconds, with
    the CPU seconds that all threads of the process had meanwhile. Few mean that it was stopped, or that its machine had
    no time for it."""
    while True:
        begin, computed = time.monotonic(), time.process_time()
        await asyncio.sleep(period)
        late = time.monotonic() - begin - period
        if late >= least:
            computed = time.process_time() - computed
            log.warning(
                "the event loop stood still for %.1f s, in which this process computed for %.1f s", late, computed
            )
