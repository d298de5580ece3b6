"""Whether a request is sent again, and when: of whole replies and of streamed ones. Waits for nothing itself."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from isotherm.cluster.client.answers import Chunk, Completion, checked, raw
from isotherm.cluster.client.errors import ConnectionFailedError, StreamBrokenError
from isotherm.cluster.client.events import Events
from isotherm.cluster.errors import one_line

_MAX_BACKOFF_S = 30.0
# Before the first token nothing has reached the caller, and a generation changes nothing on the server: asking again is
# safe. An operation has a key by which the server knows it again.
_RETRIED_ERRORS = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.RemoteProtocolError,
    httpx.ReadError,
    httpx.WriteError,
)
_RETRIED_STATUS = (429, 503)


@dataclass(frozen=True)
class Send:
    method: str
    path: str
    body: Any = None  # as JSON


class Tries:
    """Counts the tries of one request, and decides whether there is another. `base_url` is for messages, `max_retries`
    counts the tries after the first."""

    def __init__(self, base_url: str, max_retries: int) -> None:
        self._base_url = base_url
        self._max_retries = max_retries
        self._tried = 0

    def after_response(self, response: httpx.Response) -> float | None:
        """Seconds to wait before another try; None where the response counts, whatever its status."""
        if response.status_code not in _RETRIED_STATUS or self._tried >= self._max_retries:
            return None
        pause = self._backoff()
        asked = _retry_after(response.headers.get("retry-after", ""))
        return pause if asked is None else min(asked, _MAX_BACKOFF_S)

    def after_error(self, error: httpx.TransportError) -> float:
        """Seconds to wait before another try. Raises ConnectionFailedError where there is to be none."""
        if not isinstance(error, _RETRIED_ERRORS) or self._tried >= self._max_retries:
            raise ConnectionFailedError(f"{self._base_url}: {one_line(error)}") from error
        return self._backoff()

    def _backoff(self) -> float:
        self._tried += 1
        backoff: float = min(0.25 * 2 ** min(self._tried - 1, 20), _MAX_BACKOFF_S)
        return backoff * random.uniform(0.5, 1.0)


def _retry_after(value: str) -> float | None:
    """Seconds, or a date; None where it is neither."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


class StreamedReply:
    """One streamed reply, over all its tries: it is asked for again as long as nothing of it was received."""

    def __init__(self, tries: Tries) -> None:
        self._tries = tries
        self._events = Events()

    @property
    def completion(self) -> Completion:
        """What has come so far, put together."""
        return self._events.whole.completion()

    def after_response(self, response: httpx.Response) -> float | None:
        """As Tries.after_response; where it is None the response is to be read."""
        self._events = Events()
        return self._tries.after_response(response)

    def refused(self, response: httpx.Response) -> None:
        """Raises the APIError of a response whose status is not 200, and whose body was read."""
        checked(raw(response))

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Raises StreamBrokenError."""
        return self._events.feed(data)

    def end(self) -> None:
        """Raises StreamBrokenError where it was not the end."""
        self._events.end()

    def after_error(self, error: httpx.TransportError) -> float:
        """Seconds to wait before another try. Raises StreamBrokenError, ConnectionFailedError."""
        if self._events.received:
            raise StreamBrokenError(f"the connection broke: {one_line(error)}") from error
        return self._tries.after_error(error)
