"""Errors that become HTTP replies."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

CONTEXT_LENGTH = "context_length_exceeded"  # a code that clients know
# OpenAI's and Anthropic's clients ask again after a 408, a 409 and every 5xx, unless they are told not to.
NOT_AGAIN: Mapping[str, str] = MappingProxyType({"x-should-retry": "false"})


class ReplyError(IsothermError):
    """An answer in OpenAI's error form. `param` names the field, written like messages[0].content."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self) -> JSON:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ContextLengthError(ReplyError):
    """A request of more tokens than the context has. Clients that shorten a conversation and go on know it by words of
    OpenAI's, "maximum context length", or of Anthropic's."""

    def __init__(self, message: str, param: str, excess: str) -> None:
        """`excess`: "5005 tokens > 4096"."""
        super().__init__(message, param=param, code=CONTEXT_LENGTH)
        self.excess = excess


class StreamedError(ReplyError):
    """An error that a client which asked for a stream looks for in one. `events` are that stream."""

    def __init__(self, error: ReplyError, events: bytes) -> None:
        super().__init__(error.message, status=error.status, param=error.param, code=error.code, kind=error.kind)
        self.events = events


def unavailable(message: str, seconds: int = 1) -> ReplyError:
    """What cannot be done now, and may be in so many seconds."""
    headers = {"retry-after": str(seconds)}
    return ReplyError(message, status=503, kind="server_error", code="unavailable", headers=headers)


def internal_error() -> ReplyError:
    """A fault of ours, of which the log says more than the client is told."""
    return ReplyError("internal error", status=500, kind="server_error", code="internal_error")
