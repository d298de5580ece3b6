"""The end of a line in Serve's proxy: it listens, and gives each request the pieces of its reply."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.line.frames import HEADER, WORD, Frames, is_own_users
from isotherm.cluster.api.onward import KEY
from isotherm.cluster.api.stream import cancelled
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.within import within

log = logging.getLogger(__name__)
MOST_WAITING = 256 * 1024  # bytes of one stream that wait for its client, before its replica is told to wait
END_SECONDS = 5.0  # in which a stream's end comes over the line once Serve has said that the reply is whole


class LineLostError(IsothermError, ConnectionError):
    """The rest of a stream will not come."""


class Stream:
    """The pieces of one reply, from when they come to when its client has them. `connection`: which they come over,
    known from the first one on."""

    def __init__(self, number: int, most_waiting: int = MOST_WAITING) -> None:
        self.number, self._most_waiting = number, most_waiting
        self.connection: _Connection | None = None
        self.ended = asyncio.Event()  # no more pieces will come
        self.replica = ""  # its name
        self._pieces: deque[tuple[bytes, float]] = deque()
        self._waiting = 0  # bytes of them
        self._is_held = False  # its replica was told to wait
        self._is_lost = False
        self._some: asyncio.Future[None] | None = None

    def take(self, piece: bytes | None, told: float) -> None:
        if piece is None:
            self.ended.set()
        else:
            self._pieces.append((piece, told))
            self._waiting += len(piece)
            if self._waiting > self._most_waiting and not self._is_held:
                self._hold(True)
        self._wake()

    def lose(self) -> None:
        if not self.ended.is_set():
            self._is_lost = True
            self.ended.set()
            self._wake()

    async def pass_on(self, send: Send) -> None:
        """Send pieces as they come, until the end. Raises LineLostError where there are to be more."""
        while True:
            while self._pieces:
                piece, told = self._pieces.popleft()
                self._waiting -= len(piece)
                if self._is_held and self._waiting <= self._most_waiting // 2:
                    self._hold(False)
                message: Message = {"type": "http.response.body", "body": piece, "more_body": True}
                if self.replica:
                    message[KEY] = self.replica, told
                await send(message)
            if self.ended.is_set():
                break
            self._some = asyncio.get_running_loop().create_future()
            await self._some
        if self._is_lost:
            raise LineLostError("the line that a reply came over has ended before it")

    def _hold(self, is_held: bool) -> None:
        self._is_held = is_held
        if self.connection is not None:
            self.connection.say(self.number, not is_held)

    def _wake(self) -> None:
        if self._some is not None and not self._some.done():
            self._some.set_result(None)


class ProxyLine:
    """Listens under a name of the host's, which no file stands for, on the event loop that opens it first. Where the
    system has no such names there is no line."""

    def __init__(self) -> None:
        self.name = f"isotherm-line-{uuid.uuid4().hex}"
        self.streams: dict[int, Stream] = {}
        self.connections: set[_Connection] = set()
        self._numbers = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open(self) -> None:
        """Once; whoever comes meanwhile goes on without it."""
        if self._is_tried:
            return
        self._is_tried = True
        try:
            if sys.platform != "linux":
                raise OSError("this system has no Unix sockets without a file")
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(f"\0{self.name}")
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: _Connection(self), sock=listening)
        except (AttributeError, OSError) as error:
            log.warning("event streams come over Serve's own way only: %s", error)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self.connections:
            connection.abort()

    @contextlib.contextmanager
    def stream(self) -> Iterator[Stream]:
        stream = Stream(next(self._numbers))
        self.streams[stream.number] = stream
        try:
            yield stream
        finally:
            del self.streams[stream.number]


class _Connection(asyncio.Protocol):
    """From one replica."""

    def __init__(self, line: ProxyLine) -> None:
        self._line = line
        self._frames = Frames()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._line.connections.add(self)
        if not is_own_users(transport.get_extra_info("socket")):
            log.warning("a process of another user has connected to this proxy's line; it is not heard")
            self.abort()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        streams = self._line.streams
        for number, piece, told in self._frames.take(data):
            if (stream := streams.get(number)) is None:
                continue  # its client has gone
            if stream.connection is None:
                stream.connection = self
            if stream.connection is self:
                stream.take(piece, told)
            else:  # another replica had begun: never half of this one's and half of that one's
                stream.lose()

    def say(self, number: int, has_room: bool) -> None:
        self._transport.write(WORD.pack(number, has_room))

    def connection_lost(self, _error: Exception | None) -> None:
        self._line.connections.discard(self)
        for stream in self._line.streams.values():
            if stream.connection is self:
                stream.lose()


class ProxyLineMiddleware:
    """In Serve's proxy, innermost. Offers the line with each request; a reply that says that its events come there
    begins and ends as Serve says, with the pieces of the line in between."""

    def __init__(self, app: ASGIApp, line: ProxyLine | None = None, end_seconds: float = END_SECONDS) -> None:
        self.app, self._line, self._end_seconds = app, line or ProxyLine(), end_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Only this proxy says where replicas send events.
        headers = [header for header in scope["headers"] if header[0] != HEADER]
        await self._line.open()
        if not self._line.is_open:
            await self.app({**scope, "headers": headers}, receive, send)
            return
        with self._line.stream() as stream:
            headers.append((HEADER, b"%s/%d" % (self._line.name.encode(), stream.number)))
            passing: asyncio.Future[None] | None = None

            async def send_on(message: Message) -> None:
                nonlocal passing
                if message["type"] == "http.response.start":
                    theirs = message.get("headers", ())
                    others = [header for header in theirs if header[0].lower() != HEADER]
                    await send({**message, "headers": others})
                    if len(others) < len(theirs):
                        stream.replica = message.get(KEY, ("",))[0]
                        passing = asyncio.ensure_future(stream.pass_on(send))
                    return
                if passing is not None and not message.get("more_body", False):
                    await self._last_pieces(stream, passing)
                await send(message)

            try:
                await self.app({**scope, "headers": headers}, receive, send_on)
            finally:
                if passing is not None:
                    await cancelled(passing)

    async def _last_pieces(self, stream: Stream, passing: asyncio.Future[None]) -> None:
        """Raises LineLostError."""
        try:
            await within(self._end_seconds, stream.ended.wait())
        except TimeoutError:
            raise LineLostError("the end of a reply has not come over its line") from None
        await passing
