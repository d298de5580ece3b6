"""Placements and links that others have for the thread that steps, until it takes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from isotherm.actors.links.protocol import Link
from isotherm.cluster.placement.table import Placement


class Offers:
    """Any thread may `offer`, `relink` and `expect`. `flag`: int32 [1], not 0 while there is something to take, for
    code that knows no Python. `expected`: when `expect` was called last, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # of all that follows
        self._offered: tuple[Placement, dict[str, Link]] | None = None
        self._on_adopted: list[Callable[[], None]] = []
        self._relinked: dict[str, Link] = {}
        self.waiting, self.flag = False, np.zeros(1, np.int32)
        self.expected = 0.0

    def offer(self, placement: Placement, links: Mapping[str, Link], adopted: Callable[[], None]) -> None:
        with self._changed:
            self._offered = placement, {**links, **self._relinked}
            self._on_adopted.append(adopted)  # who offered an earlier one is told too: that one is out of force as well
            self._tell()

    def relink(self, group: str, link: Link) -> None:
        with self._changed:
            self._relinked[group] = link
            if self._offered is not None:
                self._offered[1][group] = link
            self._tell()

    def expect(self) -> None:
        """Experts that are missing are on their way: whoever waits for a placement that has them waits on."""
        self.expected = time.monotonic()

    def _tell(self) -> None:
        self.waiting, self.flag[0] = True, 1
        self._changed.notify()

    def take(self) -> tuple[tuple[Placement, dict[str, Link]] | None, list[Callable[[], None]], dict[str, Link]]:
        """The last placement with its links, if there is one, who is to be told that it is in force, and new links by
        group."""
        with self._changed:
            taken = self._offered, self._on_adopted, self._relinked
            self._offered, self._on_adopted, self._relinked = None, [], {}
            self.waiting, self.flag[0] = False, 0
        return taken

    def wait(self, seconds: float) -> None:
        """Until there is something to take, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting, timeout=seconds)
