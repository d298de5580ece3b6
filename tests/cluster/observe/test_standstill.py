"""What is logged of an event loop that stood still."""

from __future__ import annotations

import asyncio
import logging
import re
import time

from isotherm.cluster.observe.standstill import keep_watch


def computing(seconds: float) -> None:
    begin = time.process_time()
    while time.process_time() < begin + seconds:
        pass


def told(caplog, hold) -> tuple[float, float]:
    """The two figures of the one line that there is."""

    async def go() -> None:
        watch = asyncio.ensure_future(keep_watch(period=0.01, least=0.3))
        for _ in range(5):
            await asyncio.sleep(0.02)  # the loop is late for a while, but not for long
        hold()
        await asyncio.sleep(0.05)
        watch.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(go())
    (line,) = (record.getMessage() for record in caplog.records)
    seconds = re.fullmatch(
        r"the event loop stood still for (\d\.\d) s, in which this process computed for (\d\.\d) s", line
    )
    assert seconds, line
    return float(seconds[1]), float(seconds[2])


def test_one_that_waited_has_hardly_computed(caplog):
    still, computed = told(caplog, lambda: time.sleep(0.6))
    assert still >= 0.5 and computed <= 0.1


def test_one_that_computed_says_so(caplog):
    still, computed = told(caplog, lambda: computing(0.6))
    assert still >= 0.5 and computed >= 0.5
