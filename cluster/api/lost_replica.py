"""What clients are told of requests whose ingress replica is lost on the way: Ray Serve's proxy would leave their
connections without a word."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.error_forms import error_body, is_anthropic, plain_path, send_error
from isotherm.cluster.api.errors import unavailable
from isotherm.cluster.api.replies import sse

_LOST = unavailable("this request was lost on its way, or there are too many; ask again")
_RESPONSES = "/v1/responses"  # whose events are numbered
_EVENT = b"\n\nevent: "  # an event's end, and the next one's beginning


class LostReplicaMiddleware:
    """In Serve's proxy. A reply that has not begun is a 503 with Retry-After, also where Serve says so in its own
    words, which are plain text; a stream of events that has begun ends with an error event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        reply = _Reply()

        async def send_on(message: Message) -> None:
            reply.take(message)
            if not reply.is_serves_own:
                await send(message)

        try:
            await self.app(scope, receive, send_on)
        except asyncio.CancelledError:  # its client has gone
            raise
        except Exception:
            if reply.is_whole or (reply.has_begun and not reply.is_events):
                raise
        if reply.is_serves_own or not reply.has_begun:
            await send_error(scope["path"], _LOST, send)
        elif reply.is_events and not reply.is_whole and scope["method"] == "POST":
            event = _event(plain_path(scope["path"]), reply.events)
            await send({"type": "http.response.body", "body": event, "more_body": False})


class _Reply:
    """How far a reply has come. `events`: how many with a name have begun."""

    def __init__(self) -> None:
        self.has_begun = self.is_events = self.is_whole = self.is_serves_own = False
        self.events = 0
        self._last = b"\n\n"  # bytes, of which the next event's beginning may be the rest

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = next((v for n, v in message.get("headers", ()) if n.lower() == b"content-type"), b"")
            self.has_begun, self.is_events = True, kind.startswith(b"text/event-stream")
            self.is_serves_own = message["status"] in (500, 503) and kind.startswith(b"text/plain")
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
            if self.is_events:
                seen = self._last + message.get("body", b"")
                self.events += seen.count(_EVENT)
                self._last = seen[1 - len(_EVENT) :]


def _event(path: str, number: int) -> bytes:
    """The event that a stream of this route ends with which cannot go on, after so many. OpenAI has what is wrong in
    two places, of which clients read either."""
    if path == _RESPONSES:
        wrong = {"code": "server_error", "message": _LOST.message, "param": None}
        nested = {"error": {"type": "server_error", **wrong}}
        return sse({"type": "error", "sequence_number": number, **wrong, **nested}, "error")
    return sse(error_body(path, _LOST), "error" if is_anthropic(path) else "")
