"""What a reply that must call a tool may be, by the tools: those that are enforced, and those that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import PromptLimits, Served
from isotherm.cluster.api.tool_use import call_constraint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text import grammar_vocabulary
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tool_formats.registry import TOOL_FORMATS

TINY = Tokenizer.load(bundled_model())
USER = [{"role": "user", "content": "What is the weather?"}]


def must_call(tools: list[Any]) -> Callable[[str], bool]:
    """Whether the reply to a request that must call one of these may be a text."""
    served = Served(["m"], TINY, PromptLimits(1 << 20, TINY.vocab_size, 1 << 24), tool_format=TOOL_FORMATS["hermes"])
    asked = json.dumps({"model": "m", "messages": USER, "tools": tools, "tool_choice": "required"}).encode()
    constraint = call_constraint(parse_body(ChatBody, asked), served, ())
    assert constraint is not None

    def takes(text: str) -> bool:
        matcher = TINY.grammar_vocabulary(TINY.vocab_size).compiled(constraint.grammar).copy()
        return matcher.consume_tokens(TINY.encode(text, add_special_tokens=False)) and matcher.is_accepting()

    return takes


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_one_that_is_not_strict_is_called_with_any_arguments():
    """And the others as before."""
    odd = {"type": "object", "properties": {"a": {"type": "object", "not": {}}}}
    sums = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in (("odd", odd), ("sum", sums))]
    takes = must_call(tools)
    assert takes(call("odd", '{"a": {}}')) and takes(call("odd", '{"b": 1}')) and takes(call("sum", '{"n": 3}'))
    assert not takes(call("sum", '{"n": "3"}')) and not takes(call("other", "{}")) and not takes("No.")
    tools += [{"type": "function", "function": {"name": f"odd{i}", "parameters": odd}} for i in range(9)]
    takes = must_call(tools)  # finding each of many takes time: none is enforced then
    assert takes(call("odd8", '{"a": {}}')) and takes(call("sum", '{"n": "3"}'))
    assert not takes(call("other", "{}")) and not takes("No.")


def test_whether_one_is_enforced_does_not_depend_on_how_busy_the_machine_is(monkeypatch):
    """One that takes too long to compile is refused, not loosened: the next reply would be another."""
    monkeypatch.setattr(grammar_vocabulary, "MOST_SECONDS", -1.0)
    slow = {"type": "object", "properties": {"slow": {"enum": [17, 4]}}}
    with pytest.raises(ReplyError, match="compiling it takes") as info:
        must_call([{"type": "function", "function": {"name": "slow", "parameters": slow}}])
    assert info.value.param == "tools[0].function.parameters"


def test_tools_that_are_too_many_to_enforce_are_refused():
    words = {"type": "object", "properties": {"a": {"enum": [f"word {i}" for i in range(100)]}}}
    many = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": words, "strict": True}} for i in range(120)
    ]
    with pytest.raises(ReplyError, match="all together: the grammar has [0-9]+ characters") as info:
        must_call(many)
    assert info.value.param == "tools"
