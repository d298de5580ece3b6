"""From the messages of a chat to what a template is given, and from what it renders to the prompt: one form for
messages that mean the same, and the end of a message that is to go on.

Knows nothing about tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.chat_template import ChatTemplateError, RenderedChat
from isotherm.cluster.text.template_traits import CallForm, TemplateTraits
from isotherm.cluster.text.think_parser import THOUGHT_BEGIN, THOUGHT_END

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names that a message's thought goes by; the first is ours
# Stands behind the message that is to go on. Its space tells whether the template trims what it is given (transformers
# does the same, with a word of its own).
_GOES_ON = "\ue0c1goes on\ue0c1 "


def template_messages(messages: Sequence[Mapping[str, Any]], traits: TemplateTraits) -> list[JSON]:
    """The messages as this template wants them. What is null is left out, and so is an empty list of tool calls; a
    thought goes by the names that templates read, as in transformers; calls have their template's form."""
    return [_template_message(message, traits) for message in messages]


def _template_message(message: Mapping[str, Any], traits: TemplateTraits) -> JSON:
    out: JSON = {key: value for key, value in message.items() if value is not None}
    thought = next((out[name] for name in _THOUGHTS if name in out), None)
    if thought is not None:
        out = {"thinking": thought, **out, "reasoning_content": thought}
    if calls := out.pop("tool_calls", None):
        form = traits.call_form
        out["tool_calls"] = [_call(call, form) for call in calls]
        if not out.get("content"):
            out.pop("content", None)
            if form.content != "absent":
                out["content"] = None if form.content == "null" else ""
        return out
    return {**out, "content": out.get("content", "")}


def _call(call: JSON, form: CallForm) -> JSON:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"), form)}}


def _arguments(arguments: Any, form: CallForm) -> Any:
    if isinstance(arguments, str) or arguments is None:
        if form.arguments != "object":
            return arguments or "{}"
        try:
            # What a model wrote that is no JSON is told as it is, if the template can; so is what has no UTF-8 form.
            value = json.loads(arguments) if arguments and arguments.strip() else {}
            if "\\u" in (arguments or ""):
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return arguments
        return value
    return arguments if form.arguments == "object" else json.dumps(arguments, ensure_ascii=False)


def to_be_continued(messages: Sequence[JSON]) -> list[JSON]:
    """The messages with a mark behind the last one's content, or behind its thought where it has no content."""
    *before, last = messages
    field = "content" if last.get("content") or not last.get("reasoning_content") else "reasoning_content"
    names = [name for name in _THOUGHTS if name in last] if field == "reasoning_content" else [field]
    return [*before, {**last, **{name: (last.get(name) or "") + _GOES_ON for name in names}}]


def continued(chat: RenderedChat, message: Mapping[str, Any]) -> RenderedChat:
    """The prompt up to where the message that goes on ends: `chat` as it was rendered from `to_be_continued`, whose
    last message was `message`. Raises ChatTemplateError."""
    said = message.get("content") or message.get("reasoning_content") or ""
    end = chat.text.rfind(_GOES_ON.strip())
    if end < 0 or said.strip() not in chat.text[:end]:
        raise ChatTemplateError("the model's chat template does not tell the last message whole, so it cannot go on")
    if not chat.text.startswith(_GOES_ON, end):
        end = len(chat.text[:end].rstrip())
    return chat.until(end)


def is_in_thought(chat: RenderedChat, is_continued: bool) -> bool:
    """Whether the prompt ends inside a thought, so that the output begins there: with the tag that opens one, or with
    the message that goes on after it."""
    if not is_continued:
        return chat.text.rstrip().endswith(THOUGHT_BEGIN)
    own = [chat.text[begin:end] for begin, end in zip(chat.own[::2], chat.own[1::2], strict=True)]
    if not "".join(own).rstrip().endswith(THOUGHT_BEGIN):
        return False
    return THOUGHT_END not in chat.text[chat.text.rfind(THOUGHT_BEGIN, 0, chat.own[-1]) :]
