"""How Serve's proxy reads HTTP/1 from a connection: uvicorn's protocol, mended for clients that offer an upgrade, for
those that speak HTTP/1.0, for heads without end, or that never come, and for clients that are answered while they
send.

Ray Serve offers no way to choose the protocol, so it is put in the place of the one that uvicorn finds by itself
(`use_front_door_protocol`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httptools
import uvicorn.config
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.lingering import LingeringTransport
from isotherm.cluster.api.replies import to_json

MAX_HEAD_BYTES = 64 * 1024  # of a request line and its headers
HEAD_SECONDS = 30.0  # in which a connection must bring the whole head of its next request


def _last_words(status: bytes, error: ReplyError) -> bytes:
    """The answer to a connection of which no request is known, which ends with it."""
    said = to_json(error.body())
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (status, len(said)) + said


_TOO_LONG = _last_words(
    b"431 Request Header Fields Too Large",
    ReplyError(f"the request's line and headers take more than {MAX_HEAD_BYTES} bytes", code="headers_too_large"),
)
_TOO_LATE = _last_words(
    b"408 Request Timeout",
    ReplyError("the request's line and headers did not come in time", kind="timeout_error", code="headers_timeout"),
)
_UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


def use_front_door_protocol() -> None:
    """Every uvicorn server that this process makes from now on, and that does not ask for another protocol, uses
    FrontDoorProtocol."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{FrontDoorProtocol.__name__}"


def without_upgrade(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a request as they would be, had its client not offered to change the protocol. Names are in lower
    case."""
    kept = []
    for name, value in headers:
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in _UPGRADE_HEADERS)
        if name not in _UPGRADE_HEADERS and (value or name != b"connection"):
            kept.append((name, value))
    return kept


class FrontDoorProtocol(HttpToolsProtocol):
    """uvicorn's protocol over httptools, with five differences.

    An offer to upgrade that nobody here can take (h2c, which Java's HttpClient sends with every first request) is
    declined by reading the request's head once more without it. The parser takes whatever follows such a head for the
    other protocol, so the request's body would be lost.

    A client that speaks HTTP/1.0 knows no chunks: a body of unknown length ends with the connection.

    A head that is too long is answered 431 and read no further: the parser would keep one of any length.

    A connection that has brought no whole head `head_seconds` after it was made, or after it sent something while
    nothing was asked, ends; where a head has begun, with 408. uvicorn itself bounds only the time from an answer to the
    next byte. It costs one timer, which is looked at when it goes off.

    A connection that ends before its request has come whole is read on for a while (LingeringTransport)."""

    head_seconds = HEAD_SECONDS
    linger: Callable[[asyncio.Transport, Callable[[], bool]], LingeringTransport] = LingeringTransport
    transport: Any  # a LingeringTransport around the connection's own
    _in_head = _in_request = _refused = False
    _head_bytes = 0  # of a head that is not whole yet
    _follows = False  # in what has come at last, that head stands behind the end of another request
    # Since when it waits for a head; None: a request is open, or uvicorn's own time for the next one runs
    _waits_since: float | None = None
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = self.linger(transport, lambda: self._in_request or self._refused)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self.transport.lost()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        """From now on, unless that is so already."""
        if self._waits_since is None:
            self._waits_since = self.loop.time()
            if self._head_timer is None:
                self._head_timer = self.loop.call_at(self._waits_since + self.head_seconds, self._look_for_head)

    def _look_for_head(self) -> None:
        """A connection in time has its timer put off to where the wait that is on then is too long."""
        self._head_timer = None
        if self._waits_since is None or self.transport.is_closing():
            return
        if self.loop.time() < (until := self._waits_since + self.head_seconds):
            self._head_timer = self.loop.call_at(until, self._look_for_head)
            return
        if self._in_head:
            self.transport.write(_TOO_LATE)
        self._in_request = False  # it has had its time: what still comes is not waited for
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            self.transport.discard(len(data))
            return
        while data and not self._refused:
            try:
                self._follows = False
                self.parser.feed_data(data)
                self._bound_head(len(data))
                if self.cycle is None or self.cycle.response_complete:
                    self._wait_for_head()
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError:
                self._refused = True
                self.send_400_response("Invalid HTTP request received.")
                return

    def _bound_head(self, size: int) -> None:
        """`size` bytes have come; those of a head that has not ended are counted, but for its last unfinished line
        where it is not known how many of the bytes are those of a request before it."""
        if self._in_head:
            self._head_bytes = self._known_bytes() if self._follows else self._head_bytes + size
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()

    def _refuse_head(self) -> None:
        if not self._refused:
            self._refused = True
            self.transport.write(_TOO_LONG)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_request = True
        self._head_bytes = 0

    def _known_bytes(self) -> int:
        """Of the head's lines that have been read."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def on_headers_complete(self) -> None:
        self._in_head, self._waits_since = False, None
        if self._known_bytes() > MAX_HEAD_BYTES:
            self._refuse_head()
        elif not (self._refused or self._declines()):
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_request, self._follows = False, True
        if not (self._refused or self._declines()):
            super().on_message_complete()

    def _declines(self) -> bool:
        """Whether the head that was just read will be read again. CONNECT looks like an upgrade to the parser, and
        would be one again."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT" and not self._should_upgrade()

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return b"\r\n".join([line, *(b"%s: %s" % header for header in without_upgrade(self.headers)), b"", b""])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        if cycle.scope["http_version"] == "1.0":
            app = _unframed(app, cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]


def _unframed(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """The application, with replies of unknown length sent as they are. The cycle closes the connection after each
    reply to HTTP/1.0."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        unframed = False

        async def send_unframed(message: Message) -> None:
            nonlocal unframed
            if message["type"] == "http.response.start":
                unframed = all(name.lower() != b"content-length" for name, _ in message.get("headers", []))
                cycle.chunked_encoding = False if unframed else None
            elif unframed:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_unframed)

    return call
