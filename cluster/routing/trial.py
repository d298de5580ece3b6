"""Requests under which a shard was lost: they are tried until it is known which of them it was. Does no I/O."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakSet

from isotherm.cluster.routing.journey import Journey

# After a loss, in which suspects that were never heard of are tried one at a time. Half of what a worker that is killed
# again and again takes from one loss to the next, at the least: what meets the next one has company by then.
ALONE_SECONDS = 0.5
MOST_LOSSES = 2
# Where nobody gets on for so long while others wait, more are tried together: one that has a long prompt, or is in a
# shard's queue, must not hold up the streams of all the others.
STUCK_SECONDS = 3.0

# For so long after all suspects of a loss have got on, shards are known to be lost for another reason than a request.
UNREST_SECONDS = 60.0


class Place:
    """What one request has of the trial. One that is no suspect has a place too, which stands for nothing."""

    def __init__(self, trial: Trial, journey: Journey):
        self._trial, self._journey, self.is_on_trial = trial, journey, journey.is_suspect
        self.alone, self.unheard = journey.is_tried_alone, journey.lost_unheard
        self.in_company = False  # another suspect may be the cause of a loss as well
        # Times STUCK_SECONDS in which nobody got on, since it came; and for how many of them one that is to be tried
        # alone has nobody beside it. With each loss that it meets that is four times as many: else a slow cause among
        # others that are slow would be in company at every loss.
        self.stuck, self.patience = 0, 4 ** max(0, journey.losses_met - 1)

    @property
    def insists(self) -> bool:
        """Nobody may be tried with it."""
        return self.alone and self.stuck < self.patience

    def cleared(self) -> None:
        """The request has got on."""
        if self.is_on_trial:
            self._trial._leave(self, cleared=True)
            self._trial._acquit(self._journey)

    def lost(self) -> None:
        """Its shard was lost."""
        self._trial._suspect(self._journey)
        if self.is_on_trial:
            self._trial._lost(self)


class Trial:
    """At first one suspect at a time: if a shard is lost again, the one that it then had is the cause. First come those
    of which the lost shard had given nothing yet: what cannot be computed is seldom heard of. Where that takes long, or
    once the others' turn has come, two are tried together, and twice as many after as many have been cleared, or where
    nobody gets on for a while; a loss then accuses nobody, but each that met it is tried alone before anybody else is
    tried, for as long as its patience lasts. So a shard that is lost for another reason, while many of the last one's
    requests are still suspect, hardly ever finds an innocent one alone. Where it does nonetheless, and all suspects of
    another loss have got on a short while ago, it has another try."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.Future[None], Place]] = deque()  # those to be tried alone come first
        self._inside: list[Place] = []
        self._width = 1  # how many may be inside
        self._cleared = 0  # since the width was set
        self._alone_until = 0.0
        self._next_look: asyncio.TimerHandle | None = None  # at whether somebody has got on; while somebody waits
        self._suspects: WeakSet[Journey] = WeakSet()  # in a place or between two
        self._found = False  # a cause was among them
        self._unrest_until = 0.0

    def losses_allowed(self) -> int:
        """Shards that may be lost under one request, in succession and with no other suspect there, before it counts as
        the cause."""
        return MOST_LOSSES + (asyncio.get_running_loop().time() < self._unrest_until)

    def found(self, journey: Journey) -> None:
        """A request counts as the cause, and is tried no more."""
        self._found = True
        self._suspects.discard(journey)

    @asynccontextmanager
    async def place(self, journey: Journey) -> AsyncIterator[Place]:
        """Waits for a suspect's turn."""
        place = Place(self, journey)
        if place.is_on_trial:
            await self._turn(place)
        try:
            yield place
        finally:
            if place.is_on_trial:
                self._leave(place, cleared=False)

    async def _turn(self, place: Place) -> None:
        if not self._inside and not self._waiting:
            self._begin_alone()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if place.alone:
            self._waiting.appendleft((turn, place))
        elif place.unheard:
            behind = sum(other.alone or other.unheard for _, other in self._waiting)
            self._waiting.insert(behind, (turn, place))
        else:
            self._waiting.append((turn, place))
        self._admit()
        try:
            await turn
        except BaseException:
            if place in self._inside:
                self._leave(place, cleared=False)
            else:
                self._waiting.remove((turn, place))
                self._admit()  # it may have been the one that nobody could be tried with
            raise

    def _begin_alone(self) -> None:
        self._width, self._cleared = 1, 0
        self._alone_until = asyncio.get_running_loop().time() + ALONE_SECONDS

    def _is_one_by_one(self) -> bool:
        """Whether one that was never heard of waits for its turn, in the time in which such are tried alone."""
        unheard = bool(self._waiting) and self._waiting[0][1].unheard
        return unheard and asyncio.get_running_loop().time() <= self._alone_until

    def _has_room(self, place: Place) -> bool:
        if not self._inside:
            return True
        return len(self._inside) < self._width and not place.insists and not self._inside[0].insists

    def _admit(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][1]):
            turn, place = self._waiting.popleft()
            self._inside.append(place)
            if len(self._inside) > 1:
                for each in self._inside:
                    each.in_company = True
            if not turn.done():
                turn.set_result(None)
        if self._waiting and self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(STUCK_SECONDS, self._widen)

    def _look_anew(self) -> None:
        """The while begins again, with the next `_admit`."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def _widen(self) -> None:
        """Nobody has got on for a while: let more in. A loss accuses none of those that are in company."""
        self._next_look = None
        if not self._waiting:
            return
        for place in (*self._inside, *(place for _, place in self._waiting)):
            place.stuck += 1
        if len(self._inside) >= self._width:
            self._width, self._cleared = 2 * self._width, 0
        self._admit()

    def _leave(self, place: Place, cleared: bool) -> None:
        self._inside.remove(place)
        place.is_on_trial = False
        if cleared:
            self._cleared += 1
            self._look_anew()
        if self._cleared >= self._width and not self._is_one_by_one():
            self._width, self._cleared = 2 * self._width, 0
        if len(self._inside) == 1:
            self._inside[0].in_company = False  # whoever has left is not the cause
        self._admit()

    def _suspect(self, journey: Journey) -> None:
        if not self._suspects:
            self._found = False
        self._suspects.add(journey)

    def _acquit(self, journey: Journey) -> None:
        self._suspects.discard(journey)
        if not self._suspects and not self._found:
            self._unrest_until = asyncio.get_running_loop().time() + UNREST_SECONDS

    def _lost(self, place: Place) -> None:
        """Those that were inside with it have been lost with it, or will be told so next."""
        self._inside.remove(place)
        place.is_on_trial = False
        self._begin_alone()
        self._look_anew()
        self._admit()
