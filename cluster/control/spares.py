"""Keeps a process ready on each node that has workers: one that takes another's place begins there at once. Knows
nothing about Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from isotherm.cluster.background import Background
from isotherm.cluster.within import within

QUIET_SECONDS = 5.0  # after a worker's start before a process is made ready: its own work comes first
LASTING_SECONDS = 3600.0  # that one stands ready; then there is another


class Spares:
    """`start` begins a process on a node that waits for so many seconds at least; False: the node is gone."""

    def __init__(self, start: Callable[[str, float], Awaitable[bool]]):
        self._start = start
        self._used: dict[str, asyncio.Event] = {}
        self._background = Background()

    def used(self, node: str) -> None:
        """A worker was started there, in the process that stood ready, if any did."""
        if (used := self._used.get(node)) is None:
            used = self._used[node] = asyncio.Event()
            self._background.keep(f"the spare process of node {node}", lambda: self._keep(node, used))
        used.set()

    async def _keep(self, node: str, used: asyncio.Event) -> None:
        while True:
            while used.is_set():
                used.clear()
                await asyncio.sleep(QUIET_SECONDS)
            if not await self._start(node, LASTING_SECONDS):
                self._used.pop(node, None)
                return
            with contextlib.suppress(TimeoutError):
                await within(LASTING_SECONDS, used.wait())

    def close(self) -> None:
        """Make none ready any more. Those that stand ready are Ray's to end."""
        self._background.cancel()
        self._used.clear()
