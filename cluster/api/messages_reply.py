"""A reply of Anthropic's /v1/messages: the message as an object, or the events of its making. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic_core import from_json

from isotherm.cluster.api.choices import ChoiceDelta
from isotherm.cluster.api.error_forms import anthropic_error
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parts import Part, PartKind, Parts, Step
from isotherm.cluster.api.replies import Usage, sse
from isotherm.cluster.jsontypes import JSON

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


class MessagesReply:
    """`cut_by_context`: the output may have fewer tokens than were asked for, since no more fit into the context."""

    waiting = sse({"type": "ping"}, "ping")

    def __init__(self, message_id: str, model: str, prompt_tokens: int, cut_by_context: bool) -> None:
        self._id = message_id
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._cut_by_context = cut_by_context
        self._parts = Parts()
        self._begun = False
        self._last: ChoiceDelta | None = None

    def whole(self, choices: Sequence[ChoiceDelta], used: Usage) -> JSON:
        for delta in choices[0].pieces:
            self.events(delta)
        calls = [part for part in self._parts.all if part.kind is PartKind.CALL]
        cut = calls[-1] if calls and choices[0].cuts_call else None
        content = [_block(part, part is cut) for part in self._parts.all]
        return self._message(content, self._stopped(), _usage(used))

    def events(self, delta: ChoiceDelta) -> bytes:
        begun = b"" if self._begun else self._begin(delta)
        self._last = delta
        steps = self._parts.feed(delta.fields)
        if delta.finish_reason is not None:
            steps += self._parts.finish()
        return begun + b"".join(map(_step, steps))

    def end(self, used: Usage) -> bytes:
        return _event("message_delta", delta=self._stopped(), usage=_usage(used)) + _event("message_stop")

    def error(self, error: ReplyError) -> bytes:
        return sse(anthropic_error(error), "error")

    def _begin(self, delta: ChoiceDelta) -> bytes:
        self._begun = True
        used = _usage(Usage(self._prompt_tokens, 0, delta.cached_tokens, 0))
        return _event("message_start", message=self._message([], _NOT_STOPPED, used)) + self.waiting

    def _message(self, content: list[JSON], stopped: JSON, usage: JSON) -> JSON:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content, **stopped, "usage": usage}

    def _stopped(self) -> JSON:
        """Why it ended, and by which stop sequence."""
        last = self._last
        assert last is not None and last.finish_reason is not None
        if last.finish_reason == "stop" and last.stop is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
        reason = _STOP_REASONS[last.finish_reason]
        if reason == "max_tokens" and self._cut_by_context:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": None}


_NOT_STOPPED: JSON = {"stop_reason": None, "stop_sequence": None}


def _step(step: Step) -> bytes:
    index, kind = step.part.index, step.part.kind
    if step.what == "begins":
        return _event("content_block_start", index=index, content_block=_empty_block(step.part))
    if step.what == "grows":
        delta: JSON = {
            PartKind.THOUGHT: {"type": "thinking_delta", "thinking": step.text},
            PartKind.TEXT: {"type": "text_delta", "text": step.text},
            PartKind.CALL: {"type": "input_json_delta", "partial_json": step.text},
        }[kind]
        return _event("content_block_delta", index=index, delta=delta)
    signature = _event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
    return (signature if kind is PartKind.THOUGHT else b"") + _event("content_block_stop", index=index)


def _empty_block(part: Part) -> JSON:
    if part.kind is PartKind.CALL:
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
    return _text_block(part.kind, "")


def _block(part: Part, cut: bool) -> JSON:
    if part.kind is PartKind.CALL:
        return {**_empty_block(part), "input": _arguments(part.text, cut)}
    return _text_block(part.kind, part.text)


def _text_block(kind: PartKind, text: str) -> JSON:
    """A thought's signature would let Anthropic recognise it as its own; here it has none to give."""
    if kind is PartKind.THOUGHT:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _arguments(text: str, cut: bool) -> JSON:
    """A call's arguments. Of a call that was cut those that came, without a string that is not at its end: as
    Anthropic's clients make them of a stream. Those that are no object are shown under the key that Anthropic's
    documentation suggests for them."""
    try:
        value = from_json(text or "{}", allow_inf_nan=False, allow_partial=cut)
        json.dumps(value, allow_nan=False)  # a number may be beyond all that there are
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}


def _usage(used: Usage) -> JSON:
    """Anthropic counts the tokens that were in the cache apart."""
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"thinking_tokens": used.reasoning_tokens},
    }


def _event(kind: str, **fields: object) -> bytes:
    return sse({"type": kind, **fields}, kind)
