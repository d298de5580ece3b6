"""ASGI middlewares of the front door. Plain ASGI, since Starlette's BaseHTTPMiddleware would hide disconnects from
streaming replies."""

from __future__ import annotations

import logging
import os
import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.cors import METHODS
from isotherm.cluster.api.error_forms import id_names, plain_path, send_error
from isotherm.cluster.api.errors import internal_error
from isotherm.cluster.api.gate import GateMiddleware
from isotherm.cluster.api.health import HealthMiddleware
from isotherm.cluster.api.line.proxy_end import ProxyLineMiddleware
from isotherm.cluster.api.lost_replica import LostReplicaMiddleware
from isotherm.cluster.api.protocol import use_front_door_protocol
from isotherm.cluster.api.slow_clients import SlowClientMiddleware
from isotherm.cluster.api.unrouted import UnroutedMiddleware

log = logging.getLogger(__name__)
_EVERYTHING = "*"  # in the place of a path, by OPTIONS alone
_UNKNOWN = {"/-/routes": "/-", _EVERYTHING: "/*"}  # to paths that no application has
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# What Ray Serve takes its orders from, each with - or _ (ray/serve/_private: proxy.py, http_util.py, replica.py,
# haproxy.py): a request's time, whether a client that goes away ends it, its id, which replica it goes to (two of them,
# one of a name that can be set), and what an ingress router of Serve's own has decided.
_STEERING = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-request-id",
    b"serve-multiplexed-model-id",
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().replace("_", "-").encode(),
}
_STEERING_PREFIX = b"x-serve-router-"


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id where it is short and safe to log, else a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


class RequestIdMiddleware:
    """Gives each HTTP request an id: the client's X-Request-Id where it is short and safe to log, else a new one. It is
    in `request.state.request_id` and in the response's headers. It names the request in logs only; the engine's ids are
    always the server's own, so they can't collide. Anthropic's clients look for it under a shorter name."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        names = id_names(scope["path"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in names:
                    headers[name] = request_id
                if (parent := scope["state"].get("traceparent")) is not None:
                    headers["traceparent"] = parent
            await send(message)

        await self.app(scope, receive, send_with_id)


class UnexpectedErrorMiddleware:
    """Answers 500 for what nobody else has caught. Starlette would do so outside of all middlewares, where an answer
    gets no id and no page of another site may read it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:
            log.error("request %s failed", scope.get("state", {}).get("request_id", "?"), exc_info=error)
            if scope["type"] != "http" or begun:
                raise
            await send_error(scope["path"], internal_error(), send)


class PathMiddleware:
    """A path with slashes too many or one at its end means the path without them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := plain_path(scope["path"])) != scope["path"]:
            scope = {**scope, "path": path}
        await self.app(scope, receive, send)


def steers_serve(name: bytes) -> bool:
    """Whether Ray Serve does something because of a header of this name."""
    name = name.lower().replace(b"_", b"-")
    return name in _STEERING or name.startswith(_STEERING_PREFIX)


class ServeProxyMiddleware:
    """Around Serve's own middlewares. Removes the inbound headers by which any client could steer Ray Serve; its route
    that lists applications is an unknown path. Answers `OPTIONS *`, which asks about the server and no path of it:
    Serve finds no application for that. Gives the request its id before Serve does, which would take any text
    for one, and leaves one id in the response, where Serve adds its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        named = [header for header in scope["headers"] if not steers_serve(header[0])]
        named.append((b"x-request-id", request_id.encode()))

        async def send_with_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*others, (b"x-request-id", request_id.encode())]}
            await send(message)

        if scope["path"] == _EVERYTHING and scope["method"] == "OPTIONS":
            answer = Response(status_code=204, headers={"allow": ", ".join(METHODS)})
            await answer(scope, receive, send_with_one_id)
            return
        if (path := _UNKNOWN.get(scope["path"])) is not None:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app({**scope, "headers": named}, receive, send_with_one_id)


def serve_proxy_middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=isotherm.cluster.api.middleware:serve_proxy_middlewares. Serve
    reads those headers in its proxy, before an application's own middlewares run (ray/serve/_private/proxy.py), so they
    can only be stripped there. Serve calls this in each proxy before it starts the HTTP server, so the protocol is
    chosen here too."""
    use_front_door_protocol()
    # The last is the outermost.
    inner = Middleware(UnroutedMiddleware), Middleware(LostReplicaMiddleware), Middleware(HealthMiddleware)
    line = Middleware(ProxyLineMiddleware)
    return [
        line,
        *inner,
        Middleware(GateMiddleware),
        Middleware(SlowClientMiddleware),
        Middleware(ServeProxyMiddleware),
    ]
