"""The end of lines in a replica: event streams of requests that offer one go over it, all else as Serve has it."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.line.frames import HEADER, WORD, end, is_own_users, packed
from isotherm.cluster.api.onward import KEY

log = logging.getLogger(__name__)
WRITTEN_AT_ONCE = 64 * 1024  # bytes, after which no end of the event loop's turn is waited for


class ReplicaLine(asyncio.Protocol):
    """A connection to one proxy. Pieces of one turn of the event loop are written at once."""

    def __init__(self) -> None:
        self.is_lost = False
        self._transport: Any = None
        self._waiting: list[bytes] = []  # frames, to be written
        self._bytes = 0  # of them
        self._words = b""
        self._open: set[int] = set()  # streams that go over it
        self._held: dict[int, asyncio.Event] = {}  # those of which the proxy wants no more for now
        self._writable = asyncio.Event()
        self._writable.set()

    def begin(self, stream: int) -> None:
        self._open.add(stream)

    async def send(self, stream: int, piece: bytes, told: float) -> None:
        """Waits while the proxy has no room. Raises ConnectionError where the line is lost."""
        self._put(packed(stream, piece, told))
        if self._bytes >= WRITTEN_AT_ONCE:
            self._write()
        if not self._writable.is_set():
            await self._writable.wait()
        if (held := self._held.get(stream)) is not None:
            await held.wait()

    def end(self, stream: int) -> None:
        """No more of it. Raises ConnectionError where the line is lost."""
        self._put(end(stream))

    def forget(self, stream: int) -> None:
        self._open.discard(stream)
        self._held.pop(stream, None)

    def close(self) -> None:
        self._transport.close()

    def _put(self, frame: bytes) -> None:
        if self.is_lost:
            raise ConnectionError("the line to Serve's proxy is lost")
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._write)
        self._waiting.append(frame)
        self._bytes += len(frame)

    def _write(self) -> None:
        frames, self._waiting, self._bytes = self._waiting, [], 0
        if frames and not self.is_lost:
            self._transport.write(b"".join(frames))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        data = self._words + data
        whole = len(data) - len(data) % WORD.size
        self._words = data[whole:]
        for stream, has_room in WORD.iter_unpack(data[:whole]):
            if not has_room and stream in self._open:
                self._held.setdefault(stream, asyncio.Event())
            elif (held := self._held.pop(stream, None)) is not None:
                held.set()

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_lost = True
        self._writable.set()
        for held in self._held.values():
            held.set()
        self._held.clear()


class Lines:
    """This replica's lines, by name. A proxy on another host has none that could be reached."""

    def __init__(self) -> None:
        self._lines: dict[str, ReplicaLine] = {}
        self._unreachable: set[str] = set()  # names that could not be reached, of each of which the log has a line

    async def to(self, name: str) -> ReplicaLine | None:
        """The line of this name; None where it cannot be reached."""
        self._lines = {known: line for known, line in self._lines.items() if not line.is_lost}
        if (line := self._lines.get(name)) is not None:
            return line
        connecting = None
        try:
            connecting = socket.socket(socket.AF_UNIX)
            connecting.setblocking(False)
            connecting.connect(f"\0{name}")  # at once, or not at all
            if not is_own_users(connecting):
                raise PermissionError("it is another user's")
            _, line = await asyncio.get_running_loop().create_unix_connection(ReplicaLine, sock=connecting)
        except (AttributeError, OSError) as error:
            if name not in self._unreachable:
                log.info("events for one of Serve's proxies go Serve's way; its line cannot be reached: %s", error)
            self._unreachable.add(name)
            if connecting is not None:
                connecting.close()
            return None
        if (other := self._lines.get(name)) is not None and not other.is_lost:  # a request has made one meanwhile
            line.close()
            return other
        log.info("events for one of Serve's proxies go over its line")
        self._lines[name] = line
        return line


class ReplicaLineMiddleware:
    """Around everything else of the application of a replica behind Serve's proxy."""

    def __init__(self, app: ASGIApp, lines: Lines | None = None) -> None:
        self.app, self._lines = app, lines or Lines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        offer = None
        if scope["type"] == "http":
            offer = next((value for name, value in scope["headers"] if name == HEADER), None)
        if offer is None:
            await self.app(scope, receive, send)
            return
        name, _, digits = offer.decode("latin-1").partition("/")
        stream, line = int(digits), None

        async def send_on(message: Message) -> None:
            nonlocal line
            if message["type"] == "http.response.start" and _is_events(message):
                if (line := await self._lines.to(name)) is not None:
                    line.begin(stream)
                    message["headers"] = [*message["headers"], (HEADER, b"1")]
            elif line is not None and message["type"] == "http.response.body":
                if piece := message.get("body", b""):
                    await line.send(stream, piece, message.get(KEY, ("", math.inf))[1])
                if message.get("more_body", False):
                    return
                line.end(stream)
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        finally:
            if line is not None:
                line.forget(stream)


def _is_events(message: Message) -> bool:
    headers = message.get("headers", ())
    return any(n.lower() == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
