"""What both clients do, without doing it: requests, retries, waiting for an operation, and what comes of the answers.

A call is a generator. It yields a `Send` and is sent the response, or is thrown the httpx.TransportError that came in
its place; it yields a `Pause` and goes on when that is over; its value is the call's result. `Client` and `AsyncClient`
run it, each with an I/O of its own."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx

from isotherm.cluster.client.answers import Completion, RawResponse, checked, completion, raw, read_as
from isotherm.cluster.client.errors import APIError, ClientError, OutputCutError
from isotherm.cluster.client.params import (
    FINAL_PHASES,
    ChatParams,
    CompletionParams,
    Messages,
    ModelInfo,
    Operation,
    Prompt,
    RollTarget,
    ScaleTarget,
)
from isotherm.cluster.client.tries import Send, StreamedReply, Tries
from isotherm.cluster.client.typed import as_tool, checked_json, response_format
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.proxies import ProxyError, proxy_for

DEFAULT_URL = "http://127.0.0.1:8000"
API_KEY = "ISOTHERM_API_KEY"  # of the environment
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # of the environment, in httpx's order
_OPERATIONS = "/admin/operations"
_POLL_S = 0.1  # between looks at an operation
_T = TypeVar("_T")


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

    # --- requests ---------------------------------------------------------------------------------

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

    def get(self, path: str) -> Call[JSON]:
        return checked((yield from self.request("GET", path)))

    def post(self, path: str, body: JSON) -> Call[JSON]:
        return checked((yield from self.request("POST", path, body)))

    def model(self) -> Call[str]:
        """The first that the server lists."""
        if self._model is None:
            if not (names := (yield from self.models())):
                raise APIError(200, "the server lists no model; name one with model=…")
            self._model = names[0]
        return self._model

    # --- generation -------------------------------------------------------------------------------

    def chat(self, messages: Messages, params: Mapping[str, Any]) -> Call[Completion]:
        request = yield from self.chat_request(messages, params)
        return completion((yield from self.post(request.path, request.body)))

    def complete(self, prompt: Prompt, params: Mapping[str, Any]) -> Call[Completion]:
        request = yield from self.completion_request(prompt, params)
        return completion((yield from self.post(request.path, request.body)))

    def parse(self, messages: Messages, kind: type[_T], params: Mapping[str, Any]) -> Call[_T]:
        """Raises OutputCutError, OutputInvalidError."""
        if params.get("n") not in (None, 1):
            raise ValueError(f"n is {params['n']}: parse gives the value of one reply")
        reply = yield from self.chat(messages, {**params, "response_format": response_format(kind)})
        if reply.finish_reason == "length":
            raise OutputCutError("the reply was cut at its most tokens; a larger max_tokens lets it finish", reply.text)
        value: _T = checked_json(kind, reply.text, "the reply")
        return value

    def chat_request(self, messages: Messages, params: Mapping[str, Any]) -> Call[Send]:
        """The request alone, to be streamed or not."""
        _check_names(params, ChatParams.__optional_keys__)
        body = {"messages": _said(messages), **params}
        if body.get("tools"):
            body["tools"] = [as_tool(one) for one in body["tools"]]
        return (yield from self._with_model("/v1/chat/completions", body))

    def completion_request(self, prompt: Prompt, params: Mapping[str, Any]) -> Call[Send]:
        _check_names(params, CompletionParams.__optional_keys__)
        return (yield from self._with_model("/v1/completions", {"prompt": prompt, **params}))

    def stream_request(self, call: Call[Send]) -> Call[Send]:
        """The same, to be streamed."""
        request = yield from call
        options = {"include_usage": True, **(request.body.get("stream_options") or {})}
        return Send(request.method, request.path, {**request.body, "stream": True, "stream_options": options})

    def streamed(self) -> StreamedReply:
        return StreamedReply(Tries(self._base_url, self._max_retries))

    # --- models and tokens ------------------------------------------------------------------------

    def models(self) -> Call[list[str]]:
        body = yield from self.get("/v1/models")
        return read_as("no list of models", body, lambda body: [model["id"] for model in body["data"]])

    def model_info(self, model: str | None) -> Call[ModelInfo]:
        name = model or (yield from self.model())
        return cast("ModelInfo", (yield from self.get(f"/v1/models/{quote(name)}")))

    def tokenize(self, text: Messages, add_special_tokens: bool | None, options: Mapping[str, Any]) -> Call[list[int]]:
        body: JSON = {"prompt": text} if isinstance(text, str) else {"messages": _said(text)}
        if add_special_tokens is not None:
            body["add_special_tokens"] = add_special_tokens
        request = yield from self._with_model("/tokenize", {**body, **options})
        found = yield from self.post(request.path, request.body)
        return read_as("no list of tokens", found, lambda found: [int(token) for token in found["tokens"]])

    def detokenize(self, tokens: Sequence[int]) -> Call[str]:
        request = yield from self._with_model("/detokenize", {"tokens": list(tokens)})
        found = yield from self.post(request.path, request.body)
        return read_as("no text", found, lambda found: str(found["prompt"]))

    def ready(self) -> Call[bool]:
        return (yield from self.request("GET", "/ready", retry=False)).status == 200

    # --- operations -------------------------------------------------------------------------------

    def scale(self, dry_run: bool, idempotency_key: str | None, target: Mapping[str, Any]) -> Call[Operation]:
        _check_names(target, ScaleTarget.__optional_keys__)
        return self._operate(dry_run, idempotency_key, target)

    def roll(
        self,
        model: str | None,
        manifest: Mapping[str, Any] | None,
        dry_run: bool,
        idempotency_key: str | None,
        target: Mapping[str, Any],
    ) -> Call[Operation]:
        _check_names(target, RollTarget.__optional_keys__)
        return self._operate(dry_run, idempotency_key, {"model": model, "manifest": manifest, **target})

    def _operate(self, dry_run: bool, idempotency_key: str | None, target: Mapping[str, Any]) -> Call[Operation]:
        """What is None in `target` stays as it is."""
        asked = {name: value for name, value in target.items() if value is not None}
        body = {"dry_run": dry_run, "idempotency_key": idempotency_key or uuid.uuid4().hex, **asked}
        return cast("Operation", (yield from self.post(_OPERATIONS, body)))

    def operations(self) -> Call[list[Operation]]:
        found = yield from self.get(_OPERATIONS)
        return read_as("no list of operations", found, lambda found: list(found["operations"]))

    def operation(self, operation_id: str) -> Call[Operation]:
        return cast("Operation", (yield from self.get(f"{_OPERATIONS}/{operation_id}")))

    def wait_for_operation(
        self, operation_id: str, timeout: float, at_each_look: Callable[[Operation], None] | None = None
    ) -> Call[Operation]:
        deadline = time.monotonic() + timeout
        while True:
            operation = yield from self.operation(operation_id)
            if operation["phase"] in FINAL_PHASES:
                return operation
            if at_each_look is not None:
                at_each_look(operation)
            if time.monotonic() > deadline:
                raise TimeoutError(f"operation {operation['id']} is still {operation['phase']} after {timeout:g} s")
            yield Pause(_POLL_S)

    def _with_model(self, path: str, body: JSON) -> Call[Send]:
        body |= body.pop("extra_body", None) or {}
        if body.get("model") is None:
            body["model"] = yield from self.model()
        return Send("POST", path, body)


def _said(messages: Messages) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _check_names(params: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises TypeError. A server takes no notice of a field that it does not know, and a temperature that was spelled
    wrong would be the default without a word."""
    for name in params:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            beyond = "" if "extra_body" not in known else "; what has no name here goes into extra_body"
            raise TypeError(f"unknown parameter {name!r}{meant}{beyond}")


def http_options(base_url: str, api_key: str | None, timeout: float, transport: Any = None) -> JSON:
    """Of httpx.Client and httpx.AsyncClient. Without a key it is that of ISOTHERM_API_KEY, if there is one. `timeout`:
    seconds for each wait for data; connecting has 10 s of them at most. Without a `transport` the environment says
    through which proxy to ask. Raises ClientError where what it says is of no use."""
    # OpenAI's clients are given it with /v1, which every path here has already.
    base = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    options = {
        "base_url": base,
        "headers": bearer(api_key),
        "timeout": httpx.Timeout(timeout, connect=min(timeout, 10.0)),
        "limits": LIMITS,
        "transport": transport,
        "trust_env": False,  # it is read here
    }
    if transport is not None:
        return options
    try:
        return options | {"proxy": proxy_for(base), "verify": httpx.create_ssl_context()}
    except ProxyError as error:
        raise ClientError(str(error)) from None
    except OSError as error:  # of a file that the environment names
        given = next((f"{name} is {os.environ[name]!r}" for name in _CERTIFICATES if os.environ.get(name)), "")
        raise ClientError(f"certificates cannot be read: {given} ({one_line(error)})") from None


def bearer(api_key: str | None = None) -> dict[str, str]:
    """The header of a key; without one, of that of ISOTHERM_API_KEY, if there is one."""
    api_key = os.environ.get(API_KEY) if api_key is None else api_key
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


# Bounded by the callers' own concurrency, not by a pool that would make them wait for a connection.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)
