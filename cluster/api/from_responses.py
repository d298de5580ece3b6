"""From a body of /v1/responses, and the items that were said before it, to a chat. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any

from isotherm.cluster.api.bodies.common import RefusalPart, UnshownPart
from isotherm.cluster.api.bodies.responses import (
    AllowedTools,
    CallItem,
    CallOutputItem,
    FunctionChoice,
    HostedTool,
    Item,
    ItemTextPart,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
)
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.function_names import FunctionNames
from isotherm.cluster.api.translation import Translation, function_call, function_tool, text_parts
from isotherm.cluster.jsontypes import JSON

_SEALED = "isotherm:"  # begins what we give for `encrypted_content`: the thought, for clients that keep only that


def sealed_thought(text: str) -> str:
    """A thought as `encrypted_content`. It is no secret: the same text stands in the item's content."""
    return _SEALED + base64.b64encode(text.encode()).decode()


def translate_responses(body: ResponsesBody, items: Iterable[tuple[str, Item]], names: FunctionNames) -> Translation:
    """The chat for a body whose items, those of earlier responses included, are `items`, each with the name of the
    field that it came from, and whose functions have these `names`. Raises ReplyError."""
    turns = _Turns(names)
    if body.instructions is not None:
        turns.say("instructions", {"role": "system", "content": body.instructions})
    for param, item in items:
        turns.add(param, item)
    tools, choice, origins = _tools(body, names)
    chat = {
        **body.passed,
        "model": body.model,
        "messages": turns.messages,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_completion_tokens": body.max_output_tokens,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body),
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "user": body.safety_identifier if body.user is None else body.user,
    }
    if body.includes("message.output_text.logprobs") or body.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    origins |= {
        **turns.origins,
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "response_format.json_schema": "text.format",
        "reasoning_effort": "reasoning.effort",
        "logprobs": "include",
        **({"user": "safety_identifier"} if body.user is None else {}),
    }
    return Translation({name: value for name, value in chat.items() if value is not None}, origins)


class _Turns:
    """Makes messages of items. A thought, a text and calls that follow each other are one turn of the assistant's, and
    so is all that comes between a call and its output."""

    def __init__(self, names: FunctionNames) -> None:
        self._names = names
        self.messages: list[JSON] = []
        self.origins: dict[str, str] = {}
        self._turn: JSON | None = None  # the assistant's, to which more may come

    def add(self, param: str, item: Item) -> None:
        if isinstance(item, ReasoningItem):
            if (thought := _thought(param, item)) is not None:
                self._add_thought(param, thought)
        elif isinstance(item, CallItem):
            self._add_call(param, item)
        elif isinstance(item, CallOutputItem):
            content = _content(item.output)
            self.say(param, {"role": "tool", "tool_call_id": item.call_id, "content": content})
        elif isinstance(item, MessageItem) and item.role == "assistant":
            self._add_text(param, item)
        else:
            assert isinstance(item, MessageItem), item
            self.say(param, {"role": item.role, "content": _content(item.content)})

    def say(self, param: str, message: JSON) -> None:
        self._turn = None
        self.origins[f"messages[{len(self.messages)}]"] = param
        self.messages.append(message)

    def _begin_turn(self, param: str) -> JSON:
        self.say(param, turn := {"role": "assistant", "content": None})
        self._turn = turn
        return turn

    def _add_thought(self, param: str, thought: str) -> None:
        turn = self._turn
        if turn is None or "tool_calls" not in turn:
            turn = self._begin_turn(param)
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = thought if before is None else f"{before}\n\n{thought}"

    def _add_text(self, param: str, item: MessageItem) -> None:
        turn, content = self._turn, _content(item.content)
        if turn is None or (turn["content"] is not None and "tool_calls" not in turn):
            turn = self._begin_turn(param)
        before = turn["content"]
        turn["content"] = content if before is None else text_parts([*_texts(before), *_texts(content)])

    def _add_call(self, param: str, item: CallItem) -> None:
        turn = self._begin_turn(param) if self._turn is None else self._turn
        calls = turn.setdefault("tool_calls", [])
        self.origins[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = param
        calls.append(function_call(item.call_id, self._names.of(item.namespace, item.name), item.arguments))


def _thought(param: str, item: ReasoningItem) -> str | None:
    """Its text; None where there is none. Raises ReplyError for one that only its maker could read."""
    texts = [part.text for part in item.content or item.summary]
    if texts or item.encrypted_content is None:
        return "\n\n".join(texts) or None
    try:
        if not item.encrypted_content.startswith(_SEALED):
            raise ValueError
        return base64.b64decode(item.encrypted_content[len(_SEALED) :], validate=True).decode() or None
    except (ValueError, binascii.Error):
        param = f"{param}.encrypted_content"
        message = f"{param}: this thought was not written here, so it cannot be read; leave the item out"
        raise ReplyError(message, param=param) from None


def _content(content: str | Sequence[ItemTextPart | RefusalPart | UnshownPart]) -> str | list[JSON]:
    return content if isinstance(content, str) else text_parts([part.text for part in content])


def _texts(content: str | list[JSON]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _tools(body: ResponsesBody, names: FunctionNames) -> tuple[list[JSON] | None, Any, dict[str, str]]:
    """Tools, the choice among them, and where they come from. Raises ReplyError."""
    offered, choice = names.offered(), body.tool_choice
    if isinstance(choice, AllowedTools):
        allowed = _allowed(choice, names)
        offered, choice = [(name, one) for name, one in offered if name in allowed], choice.mode
    origins = {f"tools[{at}].function": one.param for at, (_, one) in enumerate(offered)}
    told: set[str] = set()  # namespaces whose description stands before that of a function already
    functions = []
    for name, one in offered:
        description = one.tool.description
        if one.namespace is not None and one.namespace.name not in told:
            told.add(one.namespace.name)
            description = "\n\n".join(text for text in (one.namespace.description, description) if text) or description
        functions.append(function_tool(name, description, one.tool.parameters, one.tool.strict))
    if isinstance(choice, FunctionChoice):
        origins["tool_choice.function"] = "tool_choice"
        (name,) = names.chosen(choice, "tool_choice")
        return functions or None, {"type": "function", "function": {"name": name}}, origins
    return functions or None, choice, origins


def _allowed(choice: AllowedTools, names: FunctionNames) -> set[str]:
    """The names in the chat. Hosted tools are as little among them as among those that are offered."""
    allowed: set[str] = set()
    for i, tool in enumerate(choice.tools):
        if not isinstance(tool, HostedTool):
            allowed.update(names.chosen(tool, f"tool_choice.tools[{i}].name"))
    return allowed


def _response_format(body: ResponsesBody) -> JSON | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "json_object"}
    given = {
        "name": wanted.name or "response",
        "description": wanted.description,
        "schema": wanted.schema_,
        "strict": wanted.strict,
    }
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if value is not None}}
