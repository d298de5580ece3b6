"""Until when a request has to be answered: as soon as its client wants, as late as the server lets it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers

from isotherm.cluster.api.choices import GenerationError
from isotherm.cluster.api.errors import NOT_AGAIN, ReplyError

HEADER = "x-request-timeout"
LONGEST = 86400.0  # seconds
_T = TypeVar("_T")


class DeadlineError(GenerationError):
    """A request's time is over."""


class Deadline:
    """Of a request that arrived at `arrived` on the event loop's clock. None: it has all the time in the world."""

    def __init__(self, arrived: float, seconds: float | None) -> None:
        self._arrived, self._seconds = arrived, seconds

    @property
    def at(self) -> float | None:
        return None if self._seconds is None else self._arrived + self._seconds

    def sooner(self, seconds: float | None) -> Deadline:
        """The same, or that of so many seconds, whichever comes first."""
        if seconds is None or (self._seconds is not None and self._seconds <= seconds):
            return self
        return Deadline(self._arrived, seconds)

    async def bound(self, work: Coroutine[Any, Any, _T], doing: str) -> _T:
        """The work's result. Raises DeadlineError, with the work cancelled."""
        if (at := self.at) is None:
            return await work
        try:
            return await asyncio.wait_for(work, max(0.0, at - asyncio.get_running_loop().time()))
        except asyncio.TimeoutError:
            raise self.error(doing) from None

    def watch(self, over: Callable[[], None]) -> Callable[[], object]:
        """Has `over` called when the time is over; gives what calls that off."""
        if (at := self.at) is None:
            return lambda: None
        return asyncio.get_running_loop().call_at(at, over).cancel

    def error(self, doing: str) -> DeadlineError:
        return DeadlineError(f"the request's time of {self._seconds:g} s is over; {doing}")


def time_limit(headers: Headers) -> float | None:
    """Seconds that a client gives its request. Raises ReplyError."""
    if (said := headers.get(HEADER)) is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST:
        message = f"{HEADER}: expected seconds, more than 0 and at most {LONGEST:g}, got {said[:60]!r}"
        raise ReplyError(message, param=HEADER)
    return seconds


def timed_out(error: DeadlineError) -> ReplyError:
    return ReplyError(
        str(error), status=408, kind="timeout_error", code="deadline_exceeded", param="timeout", headers=NOT_AGAIN
    )
