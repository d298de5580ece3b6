"""In which form an error is said: OpenAI's, and Anthropic's on Anthropic's routes."""

from __future__ import annotations

import re

from starlette.types import Scope, Send

from isotherm.cluster.api.errors import ContextLengthError, ReplyError
from isotherm.cluster.api.replies import to_json
from isotherm.cluster.jsontypes import JSON

_ANTHROPIC_ROUTE = "/v1/messages"
_SLASHES = re.compile(r"/{2,}")
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    408: "timeout_error",
}


# What Anthropic's clients read in an error about this field, to do without it: they send the conversation whole.
_DETAILS = {"thread": {"error_code": "thread_unsupported_request"}}


def plain_path(path: str) -> str:
    """Without surplus slashes, and without one at its end: base URLs are often given with one."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def is_anthropic(path: str) -> bool:
    path = plain_path(path)
    return path.startswith(_ANTHROPIC_ROUTE) and path[len(_ANTHROPIC_ROUTE) :][:1] in ("", "/")


def id_names(path: str) -> tuple[str, ...]:
    """The headers that tell a request's id: Anthropic's clients look for it under a shorter name."""
    return ("x-request-id", "request-id") if is_anthropic(path) else ("x-request-id",)


def id_headers(scope: Scope) -> dict[str, str]:
    """Those headers for a request that got its id, from us, in its state or in its header."""
    given = scope.get("state", {}).get("request_id")
    if given is None:
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), None)
    return {} if given is None else dict.fromkeys(id_names(scope["path"]), given)


def error_body(path: str, error: ReplyError) -> JSON:
    """The error as the route at `path` says it."""
    return anthropic_error(error) if is_anthropic(path) else error.body()


async def send_error(path: str, error: ReplyError, send: Send) -> None:
    """A whole reply of a middleware's own."""
    body = to_json(error_body(path, error))
    own = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def anthropic_error(error: ReplyError) -> JSON:
    """Its kind follows from its status. The field that it is about has no other place than the message."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_KINDS.get(error.status, other)
    message, param = error.message, error.param or ""
    said = message if message.startswith(param) else f"{param}: {message}"
    if isinstance(error, ContextLengthError):
        said = f"prompt is too long: {error.excess} maximum ({said})"
    details = {"details": _DETAILS[param]} if param in _DETAILS else {}
    return {"type": "error", "error": {"type": kind, "message": said, **details}}
