"""Streams of deltas from one attention shard to its ingress replicas: who asked for what, what is on its way, who has
gone away. Knows nothing about Ray.

A replica opens a connection and reads its stream; all deltas of its requests come over it. One that falls silent loses
its connection: its stream ends, and its requests are aborted. If it was only stopped, it opens another and resubmits
them. What the engine still says of the old ones is not for the new connection: deltas of a request go to the first that
submitted it and has not had its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from isotherm.actors.attention.outbox import FLUSH, Outbox, is_urgent, merged_deltas
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.messages.meters import DecayedMean
from isotherm.cluster.messages.requests import Delta

log = logging.getLogger(__name__)
SILENCE = 15.0  # seconds without a call after which a replica counts as gone
LOOK = SILENCE / 3  # seconds between two looks at who is silent
METER_HALF_LIFE = 10.0  # seconds after which a time to first token counts half


class UnknownConnectionError(IsothermError, ConnectionError):
    """The connection was never opened, or has been closed: the replica must open another."""


@dataclass
class _Connection:
    heard: float  # when its replica called last
    lists: asyncio.Queue[list[Delta] | None] = field(default_factory=asyncio.Queue)  # None: the stream ends
    outbox: Outbox = field(default_factory=Outbox)


class Delivery:
    """Everything but `publish` is called on the event loop that made it. `abort` ends a request in the engine, which
    gives each one that is submitted one last delta. `clock` gives seconds."""

    def __init__(self, abort: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.tokens = 0  # delivered, of all requests
        # Seconds from a request's arrival to its first token
        self.first_token = DecayedMean(METER_HALF_LIFE, lasting=3)
        self._abort, self._clock = abort, clock
        self._loop = asyncio.get_running_loop()
        self._connections: dict[str, _Connection] = {}
        self._owners: dict[str, deque[str]] = {}  # request → who is to have its end, the first one first
        self._arrived: dict[str, float] = {}  # requests without a token yet → when they came, oldest first
        self._fresh: deque[list[Delta]] = deque()  # of steps
        self._delivering = False  # the next look at them is sure to come
        self._hastened = False  # … and soon, for something is urgent
        self._next_look: asyncio.TimerHandle | None = None
        self._last_look = self._looked = clock()

    # --- replicas ---------------------------------------------------------------------------------

    async def stream(self, connection: str) -> AsyncGenerator[list[Delta]]:
        """Open a connection and give its deltas: a list per engine step, or of several steps where they are faster than
        Outbox lets them go. The first list is empty: it says that requests may be sent. Ends when the connection is
        closed; left early, it closes it."""
        opened = self._connections[connection] = _Connection(self._clock())
        try:
            yield []
            while (deltas := await opened.lists.get()) is not None:
                yield deltas
        finally:
            if self._connections.get(connection) is opened:
                self._close(connection)

    def hear(self, connection: str) -> None:
        """Note a sign of life. Raises UnknownConnectionError."""
        if (found := self._connections.get(connection)) is None:
            raise UnknownConnectionError(f"connection {connection} is not open at this shard (any more)")
        found.heard = self._clock()

    def expect(self, connection: str, request_id: str) -> None:
        """Deltas of this request will come."""
        self._owners.setdefault(request_id, deque()).append(connection)
        self._arrived.pop(request_id, None)
        self._arrived[request_id] = self._clock()

    def owns(self, connection: str, request_id: str) -> bool:
        """Whether the request was submitted over this connection, and over no other since."""
        return request_id in self._owners and self._owners[request_id][-1] == connection

    def close_silent(self) -> list[str]:
        """Close the connections of replicas that have been silent for too long; gives them. Called every LOOK seconds:
        where the last time was much longer ago, it was this process that stood still, and nobody is to blame."""
        now = self._clock()
        stood = now - self._looked - LOOK
        self._looked = now
        if stood > LOOK:
            for connection in self._connections.values():
                connection.heard += stood
        silent = [name for name, c in self._connections.items() if c.heard < now - SILENCE]
        for name in silent:
            log.warning("ingress %s fell silent; its requests are aborted and its stream ends", name)
            self._close(name)
        return silent

    def _close(self, name: str) -> None:
        for request_id in self._owners:
            if self.owns(name, request_id):
                self._abort(request_id)
        self._connections.pop(name).lists.put_nowait(None)

    # --- requests ---------------------------------------------------------------------------------

    def open_ids(self) -> list[str]:
        """Of the requests that have not ended."""
        return list(self._owners)

    @property
    def is_empty(self) -> bool:
        """No request is open, and everything has been sent."""
        waiting = any(len(c.outbox) or not c.lists.empty() for c in self._connections.values())
        return not self._owners and not self._fresh and not waiting

    def longest_wait(self) -> float:
        """Seconds since the oldest request came that has no token yet; 0 where there is none."""
        now = self._clock()
        return now - next(iter(self._arrived.values()), now)

    # --- deltas -----------------------------------------------------------------------------------

    def publish(self, deltas: list[Delta]) -> None:
        """What one step gave. For the step loop's thread."""
        # The event loop takes Python's lock from the step loop: it is not woken at every step, but where it sleeps, and
        # where the look that is sure to come would be late.
        self._fresh.append(deltas)
        if not self._delivering:
            self._delivering = True
            self._loop.call_soon_threadsafe(self._deliver)
        elif not self._hastened and is_urgent(deltas):
            self._hastened = True
            self._loop.call_soon_threadsafe(self._hasten)

    def _hasten(self) -> None:
        """Look FLUSH after the last look, if that is sooner than the next one."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = self._loop.call_later(max(0.0, self._last_look + FLUSH - self._clock()), self._deliver)

    def _deliver(self) -> None:
        """Send what is due, and look again in a moment, until there is nothing left."""
        if self._next_look is not None:
            self._next_look.cancel()  # the step loop may have asked for a look that was sure to come
        fresh: list[Delta] = []
        self._hastened = False
        while self._fresh:
            fresh += self._fresh.popleft()
        now = self._last_look = self._clock()
        looks = []  # when those connections that have streams are worth another one
        try:
            self._route(merged_deltas(fresh), now)
            for connection in self._connections.values():
                if deltas := connection.outbox.due(now):
                    connection.lists.put_nowait(deltas)
                if deltas or len(connection.outbox):
                    looks.append(connection.outbox.worth_a_look())
        finally:
            more = bool(fresh) or any(len(c.outbox) for c in self._connections.values())
            if not more:
                self._delivering = False
                more = bool(self._fresh)  # of a step that ended just now, and may have found it still set
            self._delivering = self._delivering or more
            later = max(FLUSH, min(looks, default=now) - now)
            self._next_look = self._loop.call_later(later, self._deliver) if more else None

    def _route(self, deltas: list[Delta], now: float) -> None:
        by_connection: dict[str, list[Delta]] = {}
        for delta in deltas:
            self.tokens += len(delta.token_ids)
            if (owners := self._owners.get(delta.request_id)) is None:
                continue
            by_connection.setdefault(owners[0], []).append(delta)
            if len(owners) == 1 and (delta.token_ids or delta.finish_reason is not None):
                arrived = self._arrived.pop(delta.request_id, None)
                if arrived is not None and delta.token_ids:
                    self.first_token.add(now - arrived, now)
            if delta.finish_reason is not None:
                owners.popleft()
                if not owners:
                    del self._owners[delta.request_id]
        for name, mine in by_connection.items():
            if (connection := self._connections.get(name)) is not None:  # else it was closed
                connection.outbox.put(mine)
