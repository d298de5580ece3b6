"""The blocking client of an Isotherm server, or of any server that speaks OpenAI's API. Needs httpx alone: neither
torch nor ray.

client = Client()
print(client.chat("What is 3 + 4?").text)
for chunk in client.chat("Count to ten.", stream=True):
    print(chunk.text, end="")
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, overload

import httpx

from isotherm.cluster.client.answers import Chunk, Completion, RawResponse
from isotherm.cluster.client.calls import DEFAULT_URL, Call, Calls, Messages, Pause, Prompt, Send, http_options
from isotherm.cluster.jsontypes import JSON

_T = TypeVar("_T")


class Client:
    """The blocking client. `timeout` is in seconds, for connecting and for each wait for data; `max_retries` counts the
    tries after the first."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**http_options(base_url, api_key, timeout), transport=transport)
        self._calls = Calls(self.base_url, max_retries)

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
        if stream:
            return self._stream(self._run(self._calls.chat_request(messages, params)))
        return self._run(self._calls.chat(messages, params))

    @overload
    def complete(self, prompt: Prompt, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    def complete(self, prompt: Prompt, *, stream: Literal[True], **params: Any) -> Iterator[Chunk]: ...
    def complete(self, prompt: Prompt, *, stream: bool = False, **params: Any) -> Completion | Iterator[Chunk]:
        """The continuation of a prompt (text, token ids, or a list of either). Otherwise as `chat`."""
        if stream:
            return self._stream(self._run(self._calls.completion_request(prompt, params)))
        return self._run(self._calls.complete(prompt, params))

    def models(self) -> list[str]:
        return self._run(self._calls.models())

    def ready(self) -> bool:
        """Whether requests can be served now."""
        return self._run(self._calls.ready())

    def status(self) -> JSON:
        """What `isotherm status --json` prints."""
        return self._run(self._calls.get("/status"))

    def scale(self, *, dry_run: bool = False, idempotency_key: str | None = None, **target: Any) -> JSON:
        """Begin an operation (POST /admin/operations): `expert_groups`, `attention_shards`, `copies`, `drain_nodes`,
        each what there is to be. Of `copies`, each is {"layer", "expert", "count"}; a count of None leaves it to the
        autoscaler, as it was before a number was set. A key is made where none is given, so that a retry cannot scale
        twice. Raises APIError."""
        return self._run(self._calls.scale(dry_run, idempotency_key, target))

    def operation(self, operation_id: str) -> JSON:
        """What has become of an operation."""
        return self._run(self._calls.operation(operation_id))

    def wait_for_operation(self, operation_id: str, timeout: float = 600.0) -> JSON:
        """The operation when it has ended. Raises TimeoutError after `timeout` seconds."""
        return self._run(self._calls.wait_for_operation(operation_id, timeout))

    def experts(self) -> JSON:
        """Rows, holders and group heat of every expert (GET /admin/experts)."""
        return self._run(self._calls.get("/admin/experts"))

    def autoscaler(self) -> JSON:
        """What the autoscaler sees and has decided (GET /admin/autoscaler)."""
        return self._run(self._calls.get("/admin/autoscaler"))

    def request(self, method: str, path: str, body: Any = None, *, retry: bool = True) -> RawResponse:
        """Any request of the API, with retries. Raises ConnectionFailedError; an error status is not an exception."""
        return self._run(self._calls.request(method, path, body, retry))

    def _run(self, call: Call[_T]) -> _T:
        try:
            step = next(call)
            while True:
                try:
                    outcome = self._act(step)
                except httpx.TransportError as error:
                    step = call.throw(error)
                else:
                    step = call.send(outcome)
        except StopIteration as end:
            result: _T = end.value
            return result

    def _act(self, step: Send | Pause) -> httpx.Response | None:
        if isinstance(step, Send):
            return self._http.request(step.method, step.path, json=step.body)
        time.sleep(step.seconds)
        return None

    def _stream(self, request: Send) -> Iterator[Chunk]:
        reply = self._calls.streamed(request)
        request = reply.request
        while True:
            try:
                with self._http.stream(request.method, request.path, json=request.body) as response:
                    if (pause := reply.after_response(response)) is None:
                        if response.status_code != 200:
                            response.read()
                            reply.refused(response)
                        for data in response.iter_bytes():
                            yield from reply.feed(data)
                        reply.end()
                        return
            except httpx.TransportError as error:
                pause = reply.after_error(error)
            time.sleep(pause)
