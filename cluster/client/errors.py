"""What can go wrong for a client: the server's answers by their status, connections, streams, and replies that are not
what was asked for."""

from __future__ import annotations

from isotherm.cluster.errors import IsothermError


class ClientError(IsothermError):
    """What every error of a client is."""


class APIError(ClientError):
    """The server answered with an error. `param` names the field it is about, if any."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message
        self.param = param
        self.code = code


class BadRequestError(APIError):
    """400, 413, 415, 422: the request is to be mended, the message says how."""


class AuthenticationError(APIError):
    """401: no API key, or not a valid one."""


class PermissionDeniedError(APIError):
    """403: this is not for the one who asks."""


class NotFoundError(APIError):
    """404: no such path, model or operation."""


class ConflictError(APIError):
    """409: it cannot be while another operation runs."""


class RateLimitError(APIError):
    """429, also after the retries: as many requests are open as there may be."""


class ServerError(APIError):
    """500 and above: the fault is not the request's."""


class UnavailableError(ServerError):
    """503, also after the retries: nothing can be served now."""


class ConnectionFailedError(ClientError):
    """The server could not be reached, or broke the connection, also after the retries."""


class StreamBrokenError(ClientError):
    """A stream ended early: by an error event, or without [DONE]. What was received before it is incomplete."""


class OutputError(ClientError):
    """What the model wrote is not what was asked for. `text` is what it wrote."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class OutputCutError(OutputError):
    """It was cut before its end; a larger `max_tokens` lets it finish."""


class OutputInvalidError(OutputError):
    """It is no JSON, or does not fit the type."""


class BatchError(ClientError):
    """A batch cannot run. Names the file, and the line where there is one."""


_BY_STATUS = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    429: RateLimitError,
    503: UnavailableError,
}


def api_error(status: int, message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The error of a status; one that is none of an error (a 200 with something else) is a plain APIError."""
    kind: type[APIError] = ServerError if status >= 500 else BadRequestError if status >= 400 else APIError
    return _BY_STATUS.get(status, kind)(status, message, param, code)
