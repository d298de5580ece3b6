"""Errors that become HTTP replies."""

from __future__ import annotations

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON


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
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = headers or {}

    def body(self) -> JSON:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ContextLengthError(ReplyError):
    """A request of more tokens than the context has. Clients that shorten a conversation and go on know it by words of
    OpenAI's, "maximum context length", or of Anthropic's."""

    def __init__(self, message: str, param: str, excess: str) -> None:
        """`excess`: "5005 tokens > 4096"."""
        super().__init__(message, param=param, code="context_length_exceeded")
        self.excess = excess


def unavailable(message: str, seconds: int = 1) -> ReplyError:
    """What cannot be done now, and may be in so many seconds."""
    headers = {"retry-after": str(seconds)}
    return ReplyError(message, status=503, kind="server_error", code="unavailable", headers=headers)


def internal_error() -> ReplyError:
    """A fault of ours, of which the log says more than the client is told."""
    return ReplyError("internal error", status=500, kind="server_error", code="internal_error")
