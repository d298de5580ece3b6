"""Time that passes as soon as nobody has anything to do, so that limits in a test mean the same at any load."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run_in_virtual_time(work: Coroutine[Any, Any, _T]) -> _T:
    """As asyncio.run, but that the loop's clock, which starts at 0, jumps to the next timer instead of waiting for it.
    For code that asks the loop for the time, and waits for nothing outside it."""
    with _Selector() as selector:
        loop = _Loop(selector)
        try:
            return loop.run_until_complete(work)
        finally:
            loop.run_until_complete(_rest_cancelled())
            loop.close()


async def _rest_cancelled() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


class _Selector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self.now += max(0.0, timeout)
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, selector: _Selector) -> None:
        super().__init__(selector)
        self._clock = selector

    def time(self) -> float:
        return self._clock.now
