"""What both clients do, without doing it: requests, retries, waiting for an operation, and what comes of the answers.

A call is a generator. It yields a `Send` and is sent the response, or is thrown the httpx.TransportError that came in
its place; it yields a `Pause` and goes on when that is over; its value is the call's result. `Client` and `AsyncClient`
run it, each with an I/O of its own."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from isotherm.cluster.client.answers import (
    Chunk,
    Completion,
    ConnectionFailedError,
    Events,
    RawResponse,
    StreamBrokenError,
    checked,
    completion,
    model_ids,
    raw,
)
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.loopback import reaches_this_machine

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_BACKOFF_S = 30.0
_OPERATIONS = "/admin/operations"
_POLL_S = 0.1  # between looks at an operation
# Before the first token nothing has reached the caller, and a generation changes nothing on the server: asking again is
# safe.
_RETRIED_ERRORS = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.RemoteProtocolError,
    httpx.ReadError,
    httpx.WriteError,
)
_RETRIED_STATUS = (429, 503)
_T = TypeVar("_T")

Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[Any]


@dataclass(frozen=True)
class Send:
    method: str
    path: str
    body: Any = None  # as JSON


@dataclass(frozen=True)
class Pause:
    seconds: float


Call = Generator[Send | Pause, Any, _T]


class Calls:
    """The calls of one client. `base_url` is for messages, `max_retries` counts the tries after the first."""

    def __init__(self, base_url: str, max_retries: int) -> None:
        self._base_url = base_url
        self._max_retries = max_retries
        self._model: str | None = None  # the first that the server lists, once it was asked

    def request(self, method: str, path: str, body: Any = None, retry: bool = True) -> Call[RawResponse]:
        tries = Tries(self._base_url, self._max_retries if retry else 0)
        while True:
            try:
                response = yield Send(method, path, body)
            except httpx.TransportError as error:
                yield Pause(tries.after_error(error))
                continue
            if (pause := tries.after_response(response)) is None:
                return raw(response)
            yield Pause(pause)

    def chat(self, messages: Messages, params: Mapping[str, Any]) -> Call[Completion]:
        request = yield from self.chat_request(messages, params)
        return (yield from self._generate(request))

    def complete(self, prompt: Prompt, params: Mapping[str, Any]) -> Call[Completion]:
        request = yield from self.completion_request(prompt, params)
        return (yield from self._generate(request))

    def chat_request(self, messages: Messages, params: Mapping[str, Any]) -> Call[Send]:
        """The request alone, to be streamed or not."""
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return (yield from self._with_model("/v1/chat/completions", {"messages": said, **params}))

    def completion_request(self, prompt: Prompt, params: Mapping[str, Any]) -> Call[Send]:
        return (yield from self._with_model("/v1/completions", {"prompt": prompt, **params}))

    def streamed(self, request: Send) -> StreamedReply:
        return StreamedReply(request, Tries(self._base_url, self._max_retries))

    def models(self) -> Call[list[str]]:
        return model_ids((yield from self.get("/v1/models")))

    def ready(self) -> Call[bool]:
        return (yield from self.request("GET", "/ready", retry=False)).status == 200

    def get(self, path: str) -> Call[JSON]:
        return checked((yield from self.request("GET", path)))

    def scale(self, dry_run: bool, idempotency_key: str | None, target: Mapping[str, Any]) -> Call[JSON]:
        body = {"dry_run": dry_run, "idempotency_key": idempotency_key or uuid.uuid4().hex, **target}
        return checked((yield from self.request("POST", _OPERATIONS, body)))

    def operation(self, operation_id: str) -> Call[JSON]:
        return (yield from self.get(f"{_OPERATIONS}/{operation_id}"))

    def wait_for_operation(self, operation_id: str, timeout: float) -> Call[JSON]:
        deadline = time.monotonic() + timeout
        while True:
            operation = yield from self.operation(operation_id)
            if operation["phase"] in ("done", "rolled_back", "failed"):
                return operation
            if time.monotonic() > deadline:
                raise TimeoutError(f"operation {operation['id']} is still {operation['phase']} after {timeout:g} s")
            yield Pause(_POLL_S)

    def _with_model(self, path: str, body: JSON) -> Call[Send]:
        if body.get("model") is None:
            if self._model is None:
                self._model = (yield from self.models())[0]
            body["model"] = self._model
        return Send("POST", path, body)

    def _generate(self, request: Send) -> Call[Completion]:
        return completion(checked((yield from self.request(request.method, request.path, request.body))))


class Tries:
    """Counts the tries of one request, and decides whether there is another."""

    def __init__(self, base_url: str, max_retries: int) -> None:
        self._base_url = base_url
        self._max_retries = max_retries
        self._tried = 0

    def after_response(self, response: httpx.Response) -> float | None:
        """Seconds to wait before another try; None where the response counts, whatever its status."""
        if response.status_code not in _RETRIED_STATUS or self._tried >= self._max_retries:
            return None
        asked = response.headers.get("retry-after", "")
        pause = self._backoff()
        return min(float(asked), _MAX_BACKOFF_S) if asked.isdecimal() else pause

    def after_error(self, error: httpx.TransportError) -> float:
        """Seconds to wait before another try. Raises ConnectionFailedError where there is to be none."""
        if not isinstance(error, _RETRIED_ERRORS) or self._tried >= self._max_retries:
            raise ConnectionFailedError(f"{self._base_url}: {one_line(error)}") from error
        return self._backoff()

    def _backoff(self) -> float:
        self._tried += 1
        backoff: float = min(0.25 * 2 ** (self._tried - 1), _MAX_BACKOFF_S)
        return backoff * random.uniform(0.5, 1.0)


class StreamedReply:
    """One streamed reply, over all its tries: it is asked for again as long as nothing of it was received."""

    def __init__(self, request: Send, tries: Tries) -> None:
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        self.request = Send(request.method, request.path, {**request.body, **stream})
        self._tries = tries
        self._events = Events()

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


def http_options(base_url: str, api_key: str | None, timeout: float) -> JSON:
    """Of httpx.Client and httpx.AsyncClient. `timeout` is in seconds, for connecting and for each wait for data."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    # Bounded by the callers' own concurrency, not by a pool that would make them wait for a connection.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    # OpenAI's clients are given it with /v1, which every path here has already.
    base = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    # The environment's proxies are for other machines.
    host = f"[{base.host}]" if ":" in base.host else base.host
    mounts = {f"all://{host}": None} if reaches_this_machine(base.host) else {}
    timeouts = httpx.Timeout(timeout, connect=min(timeout, 10.0))
    return {"base_url": base, "headers": headers, "timeout": timeouts, "limits": limits, "mounts": mounts}
