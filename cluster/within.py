"""How long something may take, for tasks that are cancelled at any moment: before Python 3.12 one that waits in
asyncio.wait_for forgets that it was cancelled, where what it waits for ends in the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """What `work` gives. Where it takes longer it is cancelled, and TimeoutError is raised."""
    task = asyncio.ensure_future(work)
    try:
        if not (await asyncio.wait([task], timeout=seconds))[0]:
            raise TimeoutError(f"not within {seconds:g} s")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
