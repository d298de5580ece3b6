"""What a server's answers mean to a client: errors, whole replies, and the events of a stream.

Servers and the gateways before them leave fields out, or set them to null, that OpenAI's own always have: what can be
told without them is told, and what cannot is an error of this module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON


class ClientError(IsothermError):
    """What every error of this module is."""


class APIError(ClientError):
    """The server answered with an error. `param` names the field it is about, if any."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message
        self.param = param
        self.code = code


class ConnectionFailedError(ClientError):
    """The server could not be reached, or broke the connection, also after the retries."""


class StreamBrokenError(ClientError):
    """A stream ended early: by an error event, or without [DONE]. What was received before it is incomplete."""


@dataclass(frozen=True)
class Usage:
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0  # of the completion's


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    finish_reason: str | None
    reasoning: str = ""  # the thought that came before the text, where the server tells them apart


@dataclass(frozen=True)
class Completion:
    """A reply in one piece. `text`, `reasoning` and `finish_reason` are those of the first choice."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed reply. `usage` is in the last one."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class RawResponse:
    """An answer as it came: any status, JSON body (None when it was none)."""

    status: int
    request_id: str
    body: Any


class Events:
    """Server-sent events from bytes, as they come in. Splits at line feeds only: text may hold other separators."""

    def __init__(self) -> None:
        self.received = False
        self._done = False
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Chunk]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self._done = True
                continue
            try:
                event = json.loads(payload)
            except ValueError as error:
                raise StreamBrokenError(f"an event is not JSON: {payload[:80]!r}") from error
            if not isinstance(event, dict):
                raise StreamBrokenError(f"an event is no object: {payload[:80]!r}")
            if event.get("error"):
                raise StreamBrokenError(said_in(event) or "the server reported an error")
            self.received = True
            try:
                yield from _chunks(event)
            except (TypeError, AttributeError, ValueError) as error:
                raise StreamBrokenError(f"an event is not in OpenAI's form: {payload[:80]!r}") from error

    def end(self) -> None:
        """Raises StreamBrokenError unless the stream was complete."""
        if not self._done:
            raise StreamBrokenError("the stream ended without [DONE]")


def raw(response: httpx.Response) -> RawResponse:
    try:
        body = response.json()
    except ValueError:
        body = None
    return RawResponse(response.status_code, response.headers.get("x-request-id", ""), body)


def checked(response: RawResponse) -> JSON:
    """The body of a 200 or 202. Raises APIError for anything else."""
    if response.status in (200, 202) and response.body is not None:
        body: JSON = response.body  # whoever reads it says where it is another thing
        return body
    error = response.body.get("error") if isinstance(response.body, dict) else None
    fields = error if isinstance(error, dict) else {}
    message = said_in(response.body) or "the answer is not in OpenAI's form"
    raise APIError(response.status, message, fields.get("param"), fields.get("code"))


def said_in(body: Any) -> str:
    """The message of an error's body: OpenAI's form, or what other servers and gateways have in its place. Empty where
    there is none."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error") or body.get("detail") or body.get("message")
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""


def model_ids(body: Any) -> list[str]:
    """Raises APIError where the answer is no list of models."""
    try:
        return [model["id"] for model in body["data"]]
    except (TypeError, KeyError):
        raise APIError(200, "the answer is no list of models") from None


def completion(body: Any) -> Completion:
    """Raises APIError where the answer is no reply, or one without choices."""
    try:
        choices = tuple(
            Choice(one.get("index") or 0, _text(one, "message"), one.get("finish_reason"), _reasoning(one, "message"))
            for one in body.get("choices") or ()
            if one is not None
        )
        if not choices:
            raise APIError(200, "the answer has no choices")
        return Completion(body.get("id") or "", body.get("model") or "", choices, _usage(body.get("usage")))
    except (TypeError, AttributeError, ValueError):
        raise APIError(200, "the answer is not in OpenAI's form") from None


def _chunks(event: JSON) -> Iterator[Chunk]:
    for one in event.get("choices") or ():
        if one is None:
            continue
        text, thought, reason = _text(one, "delta"), _reasoning(one, "delta"), one.get("finish_reason")
        if text or thought or reason:
            yield Chunk(text, one.get("index") or 0, reason, reasoning=thought)
    if event.get("usage"):
        yield Chunk("", usage=_usage(event["usage"]))


def _text(choice: JSON, part: str) -> str:
    """Of a choice of a chat (in its `message` or `delta`) or of a completion."""
    return _string((choice[part] or {}).get("content") if part in choice else choice.get("text"))


def _reasoning(choice: JSON, part: str) -> str:
    """The thought, under either of the names that servers give it."""
    body = choice.get(part) or {}
    return _string(body.get("reasoning_content")) or _string(body.get("reasoning"))


def _string(value: Any) -> str:
    if not isinstance(value, str | None):
        raise TypeError(f"text is {type(value).__name__}")
    return value or ""


def _usage(body: Any) -> Usage | None:
    if not body:
        return None
    prompt_details, details = body.get("prompt_tokens_details") or {}, body.get("completion_tokens_details") or {}
    counts = (
        body.get("prompt_tokens"),
        body.get("completion_tokens"),
        prompt_details.get("cached_tokens"),
        details.get("reasoning_tokens"),
    )
    return Usage(*(int(count or 0) for count in counts))
