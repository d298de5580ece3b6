"""How a connection ends whose client may still be sending: what comes is thrown away for a while, so that the client
can read its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

LINGER_SECONDS = 30.0  # at most, from the answer to the end of the connection
LINGER_SILENT_SECONDS = 5.0  # at most, from the last of what the client sent
LINGER_BYTES = 256 * 1024 * 1024  # that are thrown away at most


class LingeringTransport:
    """A connection's transport that `close` closes at once only where the client has nothing more to send, by
    `may_send`. A closed socket answers what still comes with a reset, and at that the client's system throws away the
    answer that waits to be read; a client that writes its whole body before it reads anything would only be told of the
    reset. So the sending half is closed, and what comes is read until the client ends the connection, or until one of
    the bounds above. Whoever gets the connection's data hands its size to `discard` while `is_closing`."""

    def __init__(
        self,
        transport: asyncio.Transport,
        may_send: Callable[[], bool],
        seconds: float = LINGER_SECONDS,
        silent_seconds: float = LINGER_SILENT_SECONDS,
        most_bytes: int = LINGER_BYTES,
    ) -> None:
        self._transport, self._may_send = transport, may_send
        self._seconds, self._silent_seconds, self._left = seconds, silent_seconds, most_bytes
        self._loop = asyncio.get_running_loop()
        self._until: float | None = None  # where it lingers, when that ends whatever comes
        self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._until is not None or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._may_send():
            self._transport.close()
            return
        self._heard = self._loop.time()
        self._until = self._heard + self._seconds
        if self._transport.can_write_eof():  # TLS cannot
            self._transport.write_eof()
        self._transport.resume_reading()
        self._look()

    def discard(self, size: int) -> None:
        """`size` bytes have come that nobody wants."""
        self._heard = self._loop.time()
        self._left -= size
        if self._left < 0:
            self._transport.close()

    def lost(self) -> None:
        """The connection is no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        """At the clock; what came puts off the end of a silence."""
        assert self._until is not None
        if self._loop.time() >= (end := min(self._until, self._heard + self._silent_seconds)):
            self._transport.close()
        else:
            self._timer = self._loop.call_at(end, self._look)
