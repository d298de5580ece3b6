"""What a server's answers mean to a client: whole replies, pieces of streamed ones, and errors.

Servers and the gateways before them leave fields out, or set them to null, that OpenAI's own always have: what can be
told without them is told, and what cannot is an error of the client's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from isotherm.cluster.client.errors import APIError, api_error
from isotherm.cluster.client.typed import arguments_of, checked_json
from isotherm.cluster.jsontypes import JSON

_T = TypeVar("_T")


@dataclass(frozen=True)
class Usage:
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0  # of the completion's
    accepted_prediction_tokens: int = 0  # of the completion's, as speculation guessed them
    rejected_prediction_tokens: int = 0  # guessed, and not the completion's


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called. `arguments` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str

    def parsed(self, kind: Any = dict[str, Any]) -> Any:
        """The arguments as a dict, or as any type that pydantic can check. Raises OutputInvalidError."""
        return checked_json(kind, self.arguments or "{}", f"the arguments of {self.name}")

    def run(self, function: Callable[..., _T]) -> _T:
        """What the function gives for the arguments, which are checked against its annotations before. Raises
        OutputInvalidError."""
        args, kwargs = arguments_of(function, self.arguments or "{}", f"the arguments of {self.name}")
        return function(*args, **kwargs)

    def result(self, value: Any) -> JSON:
        """The message that tells the model what came of the call; what is no text is told as JSON."""
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return {"role": "tool", "tool_call_id": self.id, "content": content}


@dataclass(frozen=True)
class ToolCallPiece:
    """What a chunk adds to the call with this index. `id` and `name` are in its first piece."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural-log probability, and the likeliest ones in its place. `logprob` is None for the first token
    of an echoed prompt; `bytes` are known in chats only."""

    token: str
    logprob: float | None
    bytes: bytes | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    finish_reason: str | None
    reasoning: str = ""  # the thought that came before the text, where the server tells them apart
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def message(self) -> JSON:
        """The choice as the assistant's message, for the next turn of the chat."""
        message: JSON = {"role": "assistant", "content": self.text or (None if self.tool_calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class Completion:
    """A whole reply. `text`, `reasoning`, `tool_calls`, `logprobs`, `finish_reason` and `message` are those of the
    first choice. `body` is the answer as it came, for what has no field here; empty where it was streamed."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    system_fingerprint: str | None = None
    body: JSON = field(default_factory=dict, repr=False, compare=False)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def message(self) -> JSON:
        return self.choices[0].message


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed reply. `usage` is in the last one."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class RawResponse:
    """An answer as it came: any status, JSON body (None when it was none)."""

    status: int
    request_id: str
    body: Any


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
    raise api_error(response.status, message, fields.get("param"), fields.get("code"))


def said_in(body: Any) -> str:
    """The message of an error's body: OpenAI's form, or what other servers and gateways have in its place. Empty where
    there is none."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error") or body.get("detail") or body.get("message")
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""


def read_as(what: str, body: Any, reader: Callable[[Any], _T]) -> _T:
    """What `reader` makes of an answer. Raises APIError where it is another thing than `what`."""
    try:
        return reader(body)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        raise APIError(200, f"the answer is {what}") from None


def completion(body: Any) -> Completion:
    """Raises APIError where the answer is no reply, or one without choices."""

    def read(body: Any) -> Completion:
        choices = tuple(_choice(one) for one in body.get("choices") or () if one is not None)
        if not choices:
            raise APIError(200, "the answer has no choices")
        fingerprint = body.get("system_fingerprint")
        used = _usage(body.get("usage"))
        return Completion(body.get("id") or "", body.get("model") or "", choices, used, fingerprint, body)

    return read_as("not in OpenAI's form", body, read)


def chunks(event: JSON) -> Iterator[Chunk]:
    """Raises TypeError, AttributeError or ValueError where an event of a stream is not in OpenAI's form."""
    for one in event.get("choices") or ():
        if one is None:
            continue
        calls = tuple(_call_piece(call) for call in (one.get("delta") or {}).get("tool_calls") or ())
        chunk = Chunk(
            _text(one, "delta"),
            one.get("index") or 0,
            one.get("finish_reason"),
            reasoning=_reasoning(one, "delta"),
            tool_calls=calls,
            logprobs=_logprobs(one.get("logprobs")),
        )
        if chunk != Chunk("", chunk.index):
            yield chunk
    if event.get("usage"):
        yield Chunk("", usage=_usage(event["usage"]))


def _choice(one: JSON) -> Choice:
    pieces = [_call_piece(call) for call in (one.get("message") or {}).get("tool_calls") or ()]
    calls = tuple(ToolCall(piece.id, piece.name, piece.arguments) for piece in pieces)
    text, thought = _text(one, "message"), _reasoning(one, "message")
    logprobs = _logprobs(one.get("logprobs"))
    return Choice(one.get("index") or 0, text, one.get("finish_reason"), thought, calls, logprobs)


def _text(choice: JSON, part: str) -> str:
    """Of a choice of a chat (in its `message` or `delta`) or of a completion."""
    return _string((choice[part] or {}).get("content") if part in choice else choice.get("text"))


def _reasoning(choice: JSON, part: str) -> str:
    """The thought, under either of the names that servers give it."""
    body = choice.get(part) or {}
    return _string(body.get("reasoning_content")) or _string(body.get("reasoning"))


def _call_piece(call: JSON) -> ToolCallPiece:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):  # some servers give the object itself
        arguments = json.dumps(arguments, ensure_ascii=False)
    index, name = call.get("index") or 0, _string(function.get("name"))
    return ToolCallPiece(int(index), _string(call.get("id")), name, _string(arguments))


def _logprobs(body: Any) -> tuple[TokenLogprob, ...]:
    """Of a chat (a list of entries) or of a completion (lists side by side)."""
    if not body:
        return ()
    if "tokens" in body:
        tokens = body["tokens"] or ()
        tops = body.get("top_logprobs") or [None] * len(tokens)
        return tuple(
            TokenLogprob(token, value, top=tuple(TokenLogprob(*pair) for pair in (top or {}).items()))
            for token, value, top in zip(tokens, body["token_logprobs"], tops, strict=True)
        )
    return tuple(_token_logprob(entry) for entry in body.get("content") or ())


def _token_logprob(entry: JSON) -> TokenLogprob:
    data, top = entry.get("bytes"), tuple(_token_logprob(one) for one in entry.get("top_logprobs") or ())
    return TokenLogprob(_string(entry.get("token")), entry.get("logprob"), None if data is None else bytes(data), top)


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
        details.get("accepted_prediction_tokens"),
        details.get("rejected_prediction_tokens"),
    )
    return Usage(*(int(count or 0) for count in counts))
