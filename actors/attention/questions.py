"""Whether rows would get through to every expert group: asked from outside, answered by the thread that steps, from
what it has heard since. Pure but for the clock that it is given."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np


class Questions:
    """Any thread may `ask`; all else is the stepping thread's. `clock` gives seconds. `flag`: int32 [1], not 0 while
    some wait, for code that knows no Python."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()  # of those that wait
        self._waiting: list[tuple[float, Callable[[bool], None]]] = []
        self.flag = np.zeros(1, np.int32)
        self._taken: list[Callable[[bool], None]] = []
        self._heard: dict[str, float] = {}  # group → when it has answered last

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def ask(self, answered: Callable[[bool], None]) -> None:
        """`answered` is told, on the stepping thread, whether rows get through."""
        with self._lock:
            self._waiting.append((self._clock(), answered))
            self.flag[0] = 1

    def follow(self, groups: Iterable[str]) -> None:
        """These groups are used from now on, and no others."""
        self._heard = {group: self._heard.get(group, -math.inf) for group in groups}

    def heard(self, group: str) -> None:
        """It has answered just now."""
        if self._waiting:
            self._heard[group] = self._clock()

    def take(self) -> list[str]:
        """Take up those that wait → the groups that have not answered since the last of them came."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self.flag[0] = 0
        self._taken = [answered for _, answered in waiting]
        newest = max((asked for asked, _ in waiting), default=-math.inf)
        return [group for group, heard in self._heard.items() if heard < newest]

    def answer(self, through: bool) -> None:
        """Tell those that were taken up."""
        taken, self._taken = self._taken, []
        for answered in taken:
            answered(through)
