"""What Ray Serve's proxy answers while it knows no application: before the first one is there, and when the last one
ends."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.error_forms import send_error
from isotherm.cluster.api.errors import unavailable

_UNAVAILABLE = unavailable("nothing is served here right now: the server starts, stops or is being updated", 2)


class UnroutedMiddleware:
    """Turns the proxy's own 404 into a 503 with Retry-After. The application has every path, and its own 404s are JSON:
    one in plain text can only be the proxy's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unrouted = False

        async def send_or_replace(message: Message) -> None:
            nonlocal unrouted
            if message["type"] == "http.response.start" and message["status"] == 404:
                unrouted = not any(
                    n.lower() == b"content-type" and v.startswith(b"application/json")
                    for n, v in message.get("headers", ())
                )
                if unrouted:
                    await send_error(scope["path"], _UNAVAILABLE, send)
            if not unrouted:
                await send(message)

        await self.app(scope, receive, send_or_replace)
