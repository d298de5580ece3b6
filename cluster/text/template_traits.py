"""What a chat template makes of tool calls, tools and thinking, found out by trying it: templates state nothing of it.

DeepSeek's concatenate a call's arguments as text, others dump an object as JSON, or go through its items; some test a
null content, others cannot take one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.chat_template import (
    DEFAULT,
    SPECIAL_TOKENS,
    TOOL_USE,
    ChatTemplate,
    ChatTemplateBrokenError,
    ChatTemplateError,
    ChatTemplateLimitError,
    RenderedChat,
)
from isotherm.cluster.text.think_parser import THOUGHT_BEGIN, THOUGHT_END
from isotherm.cluster.text.typescript_tools import UndeclarableError, declared_tools, sorted_keys

_NAME, _KEY, _VALUE = "probe_name", "probe_key", "probe_value"
_ARGUMENTS = {_KEY: _VALUE}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}
_USER = {"role": "user", "content": "hi"}
_GENERAL = (DEFAULT, TOOL_USE)
THINKING_SWITCHES = ("thinking", "enable_thinking")
_DECLARED_TOOLS = "tools_ts_str"  # the variable of templates that want tools in TypeScript


@dataclass(frozen=True)
class CallForm:
    """How a template wants the message of an assistant that called tools. `arguments`: "text" and "object" where it
    takes one of the two only, "any" where it takes either. `content`: what stands for none."""

    arguments: Literal["any", "text", "object"] = "any"
    content: Literal["null", "absent", "empty"] = "null"


class TemplateTraits:
    """The traits of one of a model's templates. Each is looked for when it is first asked for, which renders the
    template a few times."""

    def __init__(self, template: ChatTemplate, name: str, *, sorts_tools: bool = False) -> None:
        """`sorts_tools`: the tokenizer of this template gives it tools with their keys in order."""
        self._template = template
        self._name = name
        self._sorts_tools = sorts_tools

    def render(self, context: Mapping[str, Any]) -> RenderedChat:
        if context.get("tools"):
            context = {**context, **self._tools(context["tools"])}
        return self._template.render(context, self._name)

    @property
    def declares_tools(self) -> bool:
        """Whether the template wants tools in TypeScript."""
        return _DECLARED_TOOLS in self.variables

    def _tools(self, tools: Any) -> JSON:
        """The variables by which the template is told of tools."""
        if not (self._sorts_tools or self.declares_tools):
            return {"tools": tools}
        told: JSON = {"tools": sorted_keys(tools)}
        if self.declares_tools:
            # Where a schema has no declaration, such a template tells of the tools as JSON, as it does in transformers.
            with contextlib.suppress(UndeclarableError):
                told[_DECLARED_TOOLS] = declared_tools(told["tools"])
        return told

    @cached_property
    def call_form(self) -> CallForm:
        """The first form in which a call's name and arguments are told as they are; the plainest if none is."""
        forms: tuple[Literal["null", "absent", "empty"], ...] = ("null", "absent", "empty")
        for content in forms:
            as_text, as_object = self._takes(content, json.dumps(_ARGUMENTS)), self._takes(content, _ARGUMENTS)
            if as_text and as_object:
                return CallForm("any", content)
            if as_text or as_object:
                return CallForm("text" if as_text else "object", content)
        return CallForm()

    @cached_property
    def supports_tools(self) -> bool:
        """Whether tools that are offered come into the prompt at all."""
        offered = self._rendered({"messages": [_USER], "tools": [_TOOL]})
        return offered is not None and offered != self._rendered({"messages": [_USER]})

    @cached_property
    def trouble(self) -> str:
        """Why the template cannot tell even a plain message, so that no chat can be: a fault of the checkpoint. Empty
        where it can, and for a template of a purpose of its own, which wants more than that. Raises
        ChatTemplateLimitError, which may be this machine's fault."""
        if self._name not in _GENERAL:
            return ""
        tools = [_TOOL] if self._name == TOOL_USE else None
        try:
            self.render({"messages": [_USER], "tools": tools, "documents": None, "add_generation_prompt": True})
        except ChatTemplateLimitError:
            raise
        except ChatTemplateBrokenError as error:
            return str(error)
        except ChatTemplateError as error:
            unnamed = ", ".join(self.unnamed_tokens)
            hint = f"; it wants {unnamed}, which tokenizer_config.json is to name" if unnamed else ""
            return f"the model's chat template cannot tell even a plain message: {error}{hint}"
        return ""

    @property
    def unnamed_tokens(self) -> list[str]:
        """The special tokens that the template wants and the checkpoint does not name."""
        wanted = (name for name in self.variables if name in SPECIAL_TOKENS)
        return sorted(name for name in wanted if name not in self._template.special_tokens)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Those that the template reads and does not set first."""
        return self._template.variables(self._name)

    @property
    def thinking_switches(self) -> tuple[str, ...]:
        """The variables by which thinking is turned on and off."""
        return tuple(name for name in THINKING_SWITCHES if name in self.variables)

    @property
    def knows_thoughts(self) -> bool:
        """Whether the model writes thoughts. Templates of models that open them themselves (DeepSeek-R1-0528's, and the
        first of R1) have the tag alone that ends one, where they leave thoughts of earlier turns out."""
        source = self._template.sources[self._name]
        return any(tag in source for tag in (THOUGHT_BEGIN, THOUGHT_END))

    def _takes(self, content: str, arguments: str | Mapping[str, str]) -> bool:
        """Whether a call in this form is told, and in no form of Python's."""
        call = {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        message: JSON = {"role": "assistant", "tool_calls": [call]}
        if content != "absent":
            message["content"] = None if content == "null" else ""
        result = {"role": "tool", "tool_call_id": "call00000", "name": _NAME, "content": "done"}
        without = self._rendered({"messages": [_USER], "tools": [_TOOL]}) or ""
        text = self._rendered({"messages": [_USER, message, result], "tools": [_TOOL]}) or ""

        def added(part: str) -> bool:
            return text.count(part) > without.count(part)

        wrong = ("None", f"'{_KEY}'", f'\\"{_KEY}')  # Python's words, and JSON within JSON
        return all(map(added, (_NAME, _KEY, _VALUE))) and not any(map(added, wrong))

    def _rendered(self, context: Mapping[str, Any]) -> str | None:
        """None where the template refuses it."""
        try:
            return self.render({"tools": None, "documents": None, **context}).text
        except (ChatTemplateLimitError, ChatTemplateBrokenError):
            raise  # says nothing about the template: the machine may have been busy
        except ChatTemplateError:
            return None
