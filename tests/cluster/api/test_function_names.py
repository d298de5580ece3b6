from __future__ import annotations

import time

import pytest

from isotherm.cluster.api.bodies.responses import FunctionChoice, NamespaceChoice, ResponsesBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.function_names import FunctionNames, flat_name
from isotherm.cluster.api.parse import checked


def function(name):
    return {"type": "function", "name": name}


def namespace(name, *members):
    return {"type": "namespace", "name": name, "tools": [function(member) for member in members]}


def names(*tools):
    return FunctionNames(checked(ResponsesBody, {"model": "m", "input": "x", "tools": list(tools)}).functions)


def offered(*tools):
    return [name for name, _ in names(*tools).offered()]


def test_a_function_of_a_namespace_has_both_names():
    made = names(function("f"), namespace("agents", "f", "g"), namespace("mcp__files__", "read"))
    assert [name for name, _ in made.offered()] == ["f", "agents__f", "agents__g", "mcp__files__read"]
    assert made.said("agents__f") == {"namespace": "agents", "name": "f"}
    assert made.said("f") == {"name": "f"} and made.said("nobodys") == {"name": "nobodys"}
    assert made.of("agents", "g") == "agents__g" and made.of(None, "f") == "f"
    assert made.of("gone", "h") == "gone__h", "of an earlier turn"


def test_no_two_functions_have_one_name():
    tools = [namespace("a", "b__c"), namespace("a__b", "c"), function("a__b__c"), namespace("a__b__", "c")]
    made = names(*tools)
    flat = [name for name, _ in made.offered()]
    assert flat[2] == "a__b__c" and len(set(flat)) == 4 and all(name.startswith("a__b__c") for name in flat)
    again = function(flat[0])  # which nobody would call a function by chance
    assert flat[0] not in [name for name, one in names(*tools, again).offered() if one.namespace is not None]
    said = [made.said(name) for name in flat]
    assert said == [
        {"namespace": "a", "name": "b__c"},
        {"namespace": "a__b", "name": "c"},
        {"name": "a__b__c"},
        {"namespace": "a__b__", "name": "c"},
    ]
    assert [made.of(one.get("namespace"), one["name"]) for one in said] == flat


def test_a_long_name_is_cut_to_what_a_chat_takes():
    long, other = "n" * 64, "f" * 100
    flat = flat_name(long, other)
    assert len(flat) == 128 and flat.startswith(long + "__fff") and flat == flat_name(long, other)
    assert flat != flat_name(long, other + "f")
    assert names(namespace(long, other)).said(flat) == {"namespace": long, "name": other}


def test_many_functions_take_time_in_proportion():
    begin = time.process_time()
    assert len(offered(*(namespace(f"n{i}", "f", "g") for i in range(10_000)))) == 20_000
    assert time.process_time() - begin < 5


def test_the_namespace_that_is_none_adds_nothing():
    """OpenAI's models know functions of no namespace as those of `functions`, and Codex writes it so."""
    made = names(namespace("functions", "shell"))
    assert made.said("shell") == {"namespace": "functions", "name": "shell"}
    assert made.of("functions", "shell") == made.of(None, "shell") == "shell"


def test_what_a_choice_names():
    made = names(function("f"), namespace("a", "f", "g"), namespace("b", "g", "h"), namespace("empty"))

    def chosen(name, space=None):
        return made.chosen(FunctionChoice(type="function", name=name, namespace=space), "tool_choice")

    assert chosen("f") == ["f"] and chosen("f", "a") == ["a__f"] and chosen("h") == chosen("b__h") == ["b__h"]
    assert made.chosen(NamespaceChoice(type="namespace", name="b"), "tool_choice") == ["b__g", "b__h"]
    with pytest.raises(ReplyError, match=r"tool_choice: 'g' is a function of a and b; give its namespace"):
        chosen("g")
    for choice in (
        FunctionChoice(type="function", name="z"),
        FunctionChoice(type="function", name="f", namespace="b"),
        NamespaceChoice(type="namespace", name="empty"),
    ):
        with pytest.raises(ReplyError, match="is none of tools") as info:
            made.chosen(choice, "tool_choice")
        assert info.value.param == "tool_choice"
