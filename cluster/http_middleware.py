"""ASGI middlewares of the front door. Plain ASGI, since Starlette's BaseHTTPMiddleware would hide disconnects from streaming replies."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.http_unrouted import UnroutedMiddleware

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SERVE_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


class RequestIdMiddleware:
    """Gives each HTTP request an id: the client's X-Request-Id where it is short and safe to log, else a new one. It is in
    `request.state.request_id` and in the response's headers. It names the request in logs only; the engine's ids are always the server's own, so
    they can't collide."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class StripServeHeadersMiddleware:
    """Removes the inbound headers by which any client could switch off Ray Serve's timeout and disconnect handling."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name.lower() not in _SERVE_HEADERS]}
        await self.app(scope, receive, send)


def serve_proxy_middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=isotherm.cluster.http_middleware:serve_proxy_middlewares. Serve reads those headers in its proxy,
    before an application's own middlewares run (ray/serve/_private/proxy.py), so they can only be stripped there."""
    return [Middleware(UnroutedMiddleware), Middleware(StripServeHeadersMiddleware)]
