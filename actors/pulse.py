"""Signs of life of a thread that works: an event loop that answers says nothing about the thread beside it that
computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LOOK = 0.05  # seconds between two looks at the thread
ALLOWED = 4.0  # work in hand may take so many times the longest piece of late
FADING = 0.999  # what is left of a piece's length after another one


class Lately:
    """The longest of late durations but one: a single pause, of a process or of whom it waits for, is no measure of
    work, and must not let the next one pass for it."""

    def __init__(self) -> None:
        self.longest = self._pause = 0.0  # seconds; a pause, maybe

    def add(self, seconds: float) -> None:
        """The first one counts: there is nothing else to go by."""
        if not self._pause:
            self.longest = self._pause = seconds
            return
        self.longest, self._pause = FADING * self.longest, FADING * self._pause
        self.longest = max(self.longest, min(seconds, self._pause))
        self._pause = max(self._pause, seconds)


class Pulse:
    """The thread calls `beat` after each piece of its work. `prod` wakes it where it sleeps, so that it beats; `least`:
    seconds that a piece may take in any case, for instance where kernels are compiled when they are first called."""

    def __init__(self, prod: Callable[[], None] = lambda: None, least: float = 0.0):
        self.prod, self._least = prod, least
        self.beats = 0
        self.waits_for = ""  # whom the thread waits for, and may for as long as it takes; empty: nobody
        self._began = time.monotonic()  # the piece in hand
        self._stands = False  # there is none, and nobody who is only slow
        self._pieces, self._waits = Lately(), Lately()

    def beat(self) -> None:
        now = time.monotonic()
        self._pieces.add(now - self._began)
        self.beats, self._began, self._stands = self.beats + 1, now, False

    def begin(self) -> None:
        """A piece of work begins after a rest, which was none."""
        self.beats, self._began, self._stands = self.beats + 1, time.monotonic(), False

    def stand(self) -> None:
        """The thread is well, and can do nothing until what it lacks is there again: call this now and then. However
        long work has taken lately, this is none."""
        self.begin()
        self._stands = True

    def worked(self, seconds: float) -> None:
        """A piece of work has taken so many seconds, and another begins; what else the time went to was a wait."""
        self._pieces.add(seconds)
        self.begin()

    def wait(self, whom: str) -> None:
        """The thread waits for somebody else from now on; that is no piece of work either."""
        self.waits_for, self._began, self._stands = whom, time.monotonic(), False

    def answered(self, seconds: float | None = None) -> None:
        """Whom the thread waits for has answered, or has after so many seconds, of which nobody was told before."""
        self._waits.add(time.monotonic() - self._began if seconds is None else seconds)

    def go_on(self) -> None:
        """It waits no more."""
        self.waits_for, self._began, self._stands = "", time.monotonic(), False

    def waited(self) -> tuple[str, float]:
        """Whom the thread waits for, and for how many seconds already; nobody, and 0."""
        whom, began = self.waits_for, self._began
        return (whom, time.monotonic() - began) if whom else ("", 0.0)

    def as_lately(self) -> bool:
        """Whether the piece in hand, or the wait for somebody else, takes no longer than such have taken lately."""
        whom, began, stands = self.waits_for, self._began, self._stands
        return not stands and time.monotonic() - began < (self._waits if whom else self._pieces).longest

    async def felt(self) -> None:
        """As `felt` below says."""

        def may_take_longer() -> bool:
            allowed = max(self._least, ALLOWED * self._pieces.longest)
            return not self.waits_for and time.monotonic() - self._began < allowed

        await felt(lambda: self.beats, self.prod, may_take_longer)


async def felt(beats: Callable[[], int], prod: Callable[[], None], may_take_longer: Callable[[], bool]) -> None:
    """Return at the next beat, or while the piece in hand takes no longer than it may. Never, as long as neither is
    so."""
    seen = beats()
    prod()
    while True:
        await asyncio.sleep(LOOK)
        if beats() != seen or may_take_longer():
            return
