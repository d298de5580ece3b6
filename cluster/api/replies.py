"""OpenAI's replies as JSON values, whole or in chunks, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotherm.cluster.api.choices import ChoiceDelta, ChoiceStream
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.output import OutputFields, ToolCallPiece


def usage(prompt_tokens: int, choices: Sequence[ChoiceStream], n: int) -> JSON:
    """OpenAI's usage object. A prompt's cached tokens are those of the first of its `n` choices, since the prompt is
    counted once."""
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices[::n])},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }


@dataclass
class Reply:
    """The JSON of one reply, whole or in chunks."""

    id: str
    model: str
    created: int  # seconds since the epoch
    system_fingerprint: str | None
    chat: bool
    include_usage: bool = False
    _begun: set[int] = field(default_factory=set)

    def whole(self, deltas: Iterable[ChoiceDelta], used: JSON) -> JSON:
        """The reply in one piece; each choice's deltas are merged into one."""
        choices = [
            {
                "index": delta.index,
                **({"message": _message(delta.fields)} if self.chat else {"text": delta.fields.content}),
                "logprobs": delta.logprobs,
                "finish_reason": delta.finish_reason,
            }
            for delta in deltas
        ]
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": used}

    def chunks(self, delta: ChoiceDelta) -> list[JSON]:
        """The chunks for one delta: before a chat choice's first the one with its role, then one for each field that is
        set (some clients look at one alone), and the finish reason in one of its own. The logprobs are in the first
        that has a field, and where no text is final yet in one with an empty content."""
        index, logprobs, out = delta.index, delta.logprobs, []
        if self.chat and index not in self._begun:
            self._begun.add(index)
            out.append(self._chunk(index, {"role": "assistant", "content": "", "refusal": None}))
        for body in self._bodies(delta):
            out.append(self._chunk(index, body, logprobs))
            logprobs = None
        if delta.finish_reason is not None:
            out.append(self._chunk(index, {}, finish_reason=delta.finish_reason))
        return out

    def _bodies(self, delta: ChoiceDelta) -> list[JSON]:
        fields = delta.fields
        bodies: list[JSON] = []
        if fields.reasoning:
            bodies.append(_reasoning(fields.reasoning))
        if fields.content:
            bodies.append({"content": fields.content})
        if fields.tool_calls:
            bodies.append({"tool_calls": [_tool_call_piece(call) for call in fields.tool_calls]})
        return bodies or ([{"content": ""}] if delta.logprobs is not None else [])

    def usage_chunk(self, used: JSON) -> JSON:
        return {**self._head(self._chunk_object), "choices": [], "usage": used}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: JSON,
        logprobs: JSON | None = None,
        finish_reason: str | None = None,
    ) -> JSON:
        body: JSON = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        chunk = {
            **self._head(self._chunk_object),
            "choices": [{"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}],
        }
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> JSON:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def _message(fields: OutputFields) -> JSON:
    message: JSON = {"role": "assistant", "content": fields.content, "refusal": None}
    if fields.reasoning:
        message |= _reasoning(fields.reasoning)
    if fields.tool_calls:
        calls = [_tool_call_piece(call) for call in fields.tool_calls]
        message |= {
            "content": fields.content or None,
            "tool_calls": [{key: value for key, value in call.items() if key != "index"} for call in calls],
        }
    return message


def _reasoning(text: str) -> JSON:
    """Under the name that DeepSeek's API and most clients use, and under the newer one of other servers."""
    return {"reasoning_content": text, "reasoning": text}


def _tool_call_piece(call: ToolCallPiece) -> JSON:
    """Its id, type and name are said once, in the call's first piece."""
    function = {"name": call.name} if call.name else {}
    head = {"id": call.id, "type": "function"} if call.id else {}
    return {"index": call.index, **head, "function": {**function, "arguments": call.arguments}}


def sse(value: JSON) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. The three line separators outside ASCII are escaped, since some clients split events with
    str.splitlines."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, escaped in (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085")):
        if char in text:
            text = text.replace(char, escaped)
    return text.encode()
