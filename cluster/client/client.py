"""Talks to an Isotherm server, or to any server that speaks OpenAI's API. Needs httpx alone: neither torch nor ray.

client = Client()
print(client.chat("What is 3 + 4?").text)
for chunk in client.chat("Count to ten.", stream=True):
    print(chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import httpx

from isotherm.cluster.client.answers import (
    APIError,
    Choice,
    Chunk,
    ClientError,
    Completion,
    ConnectionFailedError,
    Events,
    RawResponse,
    StreamBrokenError,
    Usage,
    checked,
    completion,
    model_ids,
    raw,
)
from isotherm.cluster.loopback import reaches_this_machine

_DEFAULT_URL = "http://127.0.0.1:8000"
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
__all__ = [
    "APIError",
    "AsyncClient",
    "Choice",
    "Chunk",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailedError",
    "RawResponse",
    "StreamBrokenError",
    "Usage",
]


Messages = str | Sequence[Mapping[str, Any]]


class Client:
    """The blocking client. `timeout` is in seconds, for connecting and for each wait for data; `max_retries` counts the
    tries after the first."""

    def __init__(
        self,
        base_url: str = _DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**_http_options(base_url, api_key, timeout), transport=transport)
        self._max_retries = max_retries
        self._model: str | None = None

    @property
    def base_url(self) -> str:
        """Without /v1 and without a slash at its end."""
        return str(self._http.base_url).rstrip("/")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **params: Any) -> Iterator[Chunk]: ...
    def chat(self, messages: Messages, *, stream: bool = False, **params: Any) -> Completion | Iterator[Chunk]:
        """The reply to a chat: a string (one user message) or a list of messages. `params` are OpenAI's request fields;
        without `model` it is the first that the server lists. Raises APIError, ConnectionFailedError, and while
        streaming StreamBrokenError."""
        return self._generate("/v1/chat/completions", {"messages": _messages(messages), **params}, stream)

    @overload
    def complete(self, prompt: str | Sequence[Any], *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    def complete(self, prompt: str | Sequence[Any], *, stream: Literal[True], **params: Any) -> Iterator[Chunk]: ...
    def complete(
        self, prompt: str | Sequence[Any], *, stream: bool = False, **params: Any
    ) -> Completion | Iterator[Chunk]:
        """The continuation of a prompt (text, token ids, or a list of either). Otherwise as `chat`."""
        return self._generate("/v1/completions", {"prompt": prompt, **params}, stream)

    def models(self) -> list[str]:
        return model_ids(checked(self.request("GET", "/v1/models")))

    def ready(self) -> bool:
        """Whether requests can be served now."""
        return self.request("GET", "/ready", retry=False).status == 200

    def status(self) -> dict[str, Any]:
        """What `isotherm status --json` prints."""
        return checked(self.request("GET", "/status"))

    def scale(self, *, dry_run: bool = False, idempotency_key: str | None = None, **target: Any) -> dict[str, Any]:
        """Begin an operation (POST /admin/operations): `expert_groups`, `attention_shards`, `copies`, `drain_nodes`,
        each what there is to be. Of `copies`, each is {"layer", "expert", "count"}; a count of None leaves it to the
        autoscaler, as it was before a number was set. A key is made where none is given, so that a retry cannot scale
        twice. Raises APIError."""
        return checked(self.request("POST", _OPERATIONS, _operation_body(dry_run, idempotency_key, target)))

    def operation(self, operation_id: str) -> dict[str, Any]:
        """What has become of an operation."""
        return checked(self.request("GET", f"{_OPERATIONS}/{operation_id}"))

    def wait_for_operation(self, operation_id: str, timeout: float = 600.0) -> dict[str, Any]:
        """The operation when it has ended. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not _has_ended(operation := self.operation(operation_id), deadline, timeout):
            time.sleep(_POLL_S)
        return operation

    def experts(self) -> dict[str, Any]:
        """Rows, holders and group heat of every expert (GET /admin/experts)."""
        return checked(self.request("GET", "/admin/experts"))

    def autoscaler(self) -> dict[str, Any]:
        """What the autoscaler sees and has decided (GET /admin/autoscaler)."""
        return checked(self.request("GET", "/admin/autoscaler"))

    def request(self, method: str, path: str, body: Any = None, *, retry: bool = True) -> RawResponse:
        """Any request of the API, with retries. Raises ConnectionFailedError; an error status is not an exception."""
        attempt = 0
        while True:
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                wait = _wait_after(error, None, attempt, self._max_retries * retry)
                if wait is None:
                    raise ConnectionFailedError(f"{self._http.base_url}: {_said(error)}") from error
            else:
                wait = _wait_after(None, response, attempt, self._max_retries * retry)
                if wait is None:
                    return raw(response)
            time.sleep(wait)
            attempt += 1

    def _generate(self, path: str, body: dict[str, Any], stream: bool) -> Completion | Iterator[Chunk]:
        if body.get("model") is None:
            if self._model is None:
                self._model = self.models()[0]
            body["model"] = self._model
        if stream:
            return self._stream(path, _streaming(body))
        return completion(checked(self.request("POST", path, body)))

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Chunk]:
        attempt = 0
        while True:
            events = Events()
            try:
                with self._http.stream("POST", path, json=body) as response:
                    wait = _wait_after(None, response, attempt, self._max_retries)
                    if wait is None:
                        if response.status_code != 200:
                            response.read()
                            checked(raw(response))
                        for data in response.iter_bytes():
                            yield from events.feed(data)
                        events.end()
                        return
            except httpx.TransportError as error:
                wait = None if events.received else _wait_after(error, None, attempt, self._max_retries)
                if wait is None:
                    raise _stream_error(error, events, str(self._http.base_url)) from error
            time.sleep(wait)
            attempt += 1


class AsyncClient:
    """The client for asyncio. A streaming call is awaited too: `async for chunk in await client.chat("…",
    stream=True)`."""

    def __init__(
        self,
        base_url: str = _DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**_http_options(base_url, api_key, timeout), transport=transport)
        self._max_retries = max_retries
        self._model: str | None = None

    @property
    def base_url(self) -> str:
        """As Client.base_url."""
        return str(self._http.base_url).rstrip("/")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    @overload
    async def chat(self, messages: Messages, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    async def chat(self, messages: Messages, *, stream: Literal[True], **params: Any) -> AsyncIterator[Chunk]: ...
    async def chat(
        self, messages: Messages, *, stream: bool = False, **params: Any
    ) -> Completion | AsyncIterator[Chunk]:
        """As Client.chat."""
        return await self._generate("/v1/chat/completions", {"messages": _messages(messages), **params}, stream)

    @overload
    async def complete(
        self, prompt: str | Sequence[Any], *, stream: Literal[False] = False, **params: Any
    ) -> Completion: ...
    @overload
    async def complete(
        self, prompt: str | Sequence[Any], *, stream: Literal[True], **params: Any
    ) -> AsyncIterator[Chunk]: ...
    async def complete(
        self, prompt: str | Sequence[Any], *, stream: bool = False, **params: Any
    ) -> Completion | AsyncIterator[Chunk]:
        """As Client.complete."""
        return await self._generate("/v1/completions", {"prompt": prompt, **params}, stream)

    async def models(self) -> list[str]:
        return model_ids(checked(await self.request("GET", "/v1/models")))

    async def ready(self) -> bool:
        """Whether requests can be served now."""
        return (await self.request("GET", "/ready", retry=False)).status == 200

    async def status(self) -> dict[str, Any]:
        """What `isotherm status --json` prints."""
        return checked(await self.request("GET", "/status"))

    async def scale(
        self, *, dry_run: bool = False, idempotency_key: str | None = None, **target: Any
    ) -> dict[str, Any]:
        """As Client.scale."""
        return checked(await self.request("POST", _OPERATIONS, _operation_body(dry_run, idempotency_key, target)))

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """What has become of an operation."""
        return checked(await self.request("GET", f"{_OPERATIONS}/{operation_id}"))

    async def wait_for_operation(self, operation_id: str, timeout: float = 600.0) -> dict[str, Any]:
        """As Client.wait_for_operation."""
        deadline = time.monotonic() + timeout
        while not _has_ended(operation := await self.operation(operation_id), deadline, timeout):
            await asyncio.sleep(_POLL_S)
        return operation

    async def experts(self) -> dict[str, Any]:
        """As Client.experts."""
        return checked(await self.request("GET", "/admin/experts"))

    async def autoscaler(self) -> dict[str, Any]:
        """As Client.autoscaler."""
        return checked(await self.request("GET", "/admin/autoscaler"))

    async def request(self, method: str, path: str, body: Any = None, *, retry: bool = True) -> RawResponse:
        """As Client.request."""
        attempt = 0
        while True:
            try:
                response = await self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                wait = _wait_after(error, None, attempt, self._max_retries * retry)
                if wait is None:
                    raise ConnectionFailedError(f"{self._http.base_url}: {_said(error)}") from error
            else:
                wait = _wait_after(None, response, attempt, self._max_retries * retry)
                if wait is None:
                    return raw(response)
            await asyncio.sleep(wait)
            attempt += 1

    async def _generate(self, path: str, body: dict[str, Any], stream: bool) -> Completion | AsyncIterator[Chunk]:
        if body.get("model") is None:
            if self._model is None:
                self._model = (await self.models())[0]
            body["model"] = self._model
        if stream:
            return self._stream(path, _streaming(body))
        return completion(checked(await self.request("POST", path, body)))

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[Chunk]:
        attempt = 0
        while True:
            events = Events()
            try:
                async with self._http.stream("POST", path, json=body) as response:
                    wait = _wait_after(None, response, attempt, self._max_retries)
                    if wait is None:
                        if response.status_code != 200:
                            await response.aread()
                            checked(raw(response))
                        async for data in response.aiter_bytes():
                            for chunk in events.feed(data):
                                yield chunk
                        events.end()
                        return
            except httpx.TransportError as error:
                wait = None if events.received else _wait_after(error, None, attempt, self._max_retries)
                if wait is None:
                    raise _stream_error(error, events, str(self._http.base_url)) from error
            await asyncio.sleep(wait)
            attempt += 1


def _http_options(base_url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
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


def _messages(messages: Messages) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _operation_body(dry_run: bool, idempotency_key: str | None, target: dict[str, Any]) -> dict[str, Any]:
    return {"dry_run": dry_run, "idempotency_key": idempotency_key or uuid.uuid4().hex, **target}


def _has_ended(operation: dict[str, Any], deadline: float, timeout: float) -> bool:
    """Raises TimeoutError when the deadline is over and it has not."""
    if operation["phase"] in ("done", "rolled_back", "failed"):
        return True
    if time.monotonic() > deadline:
        raise TimeoutError(f"operation {operation['id']} is still {operation['phase']} after {timeout:g} s")
    return False


def _streaming(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def _wait_after(
    error: httpx.TransportError | None, response: httpx.Response | None, attempt: int, max_retries: int
) -> float | None:
    """Seconds to wait before another try; None when there is to be none."""
    retriable = isinstance(error, _RETRIED_ERRORS) if response is None else response.status_code in _RETRIED_STATUS
    if not retriable or attempt >= max_retries:
        return None
    asked = "" if response is None else response.headers.get("retry-after", "")
    if asked.isdecimal():
        return min(float(asked), _MAX_BACKOFF_S)
    return min(0.25 * 2**attempt, _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _stream_error(error: httpx.TransportError, events: Events, base_url: str) -> ClientError:
    if events.received:
        return StreamBrokenError(f"the connection broke: {_said(error)}")
    return ConnectionFailedError(f"{base_url}: {_said(error)}")
