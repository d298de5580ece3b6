"""What a chat may say of tools."""

from __future__ import annotations

import json

import pytest

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.text.tool_formats.base import Tool

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"description": "Get it.", "name": "weather", "parameters": CITY, "strict": True, "x": 1},
    "cache_control": {"type": "ephemeral"},
}
NOW = {"type": "function", "function": {"name": "now", "description": None}}
TOOLS = [WEATHER, NOW]


def body(**fields):
    fields = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_body(ChatBody, json.dumps(fields).encode())


def named(name):
    return {"type": "function", "function": {"name": name}}


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def test_what_templates_are_told():
    """The function as the client orders it, without what speaks to the server alone; a schema where there is none."""
    weather, now = body(tools=TOOLS).template_tools
    assert list(weather["function"].items()) == [
        ("description", "Get it."),
        ("name", "weather"),
        ("parameters", CITY),
    ]
    assert now == {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    assert weather.keys() == {"type", "function"}
    assert body(tools=[]).template_tools is body().template_tools is None


@pytest.mark.parametrize(
    ("choice", "callable_names", "must_call", "parallel"),
    [
        (None, ["weather", "now"], False, True),
        ("auto", ["weather", "now"], False, True),
        ("required", ["weather", "now"], True, True),
        (named("now"), ["now"], True, False),
        ("none", [], False, True),
    ],
)
def test_what_may_and_must_be_called(choice, callable_names, must_call, parallel):
    asked = body(tools=TOOLS, tool_choice=choice)
    assert [tool.name for tool in asked.callable_tools] == callable_names
    assert (asked.must_call, asked.calls_in_parallel) == (must_call, parallel)
    assert len(asked.template_tools) == 2
    assert not body(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).calls_in_parallel


def test_a_tool_is_what_was_said_of_it():
    weather, now = body(tools=TOOLS).callable_tools
    assert weather == Tool("weather", CITY, strict=True)
    assert now == Tool("now", {"type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [1]}, "tools[0]", "object"),
        ({"tools": {}}, "tools", "list"),
        ({"tools": [NOW] * 513}, "tools", "512"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "custom"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name", "a b"),
        ({"tools": [function(name="")]}, "tools[0].function.name", "pattern"),
        ({"tools": [function(strict="yes")]}, "tools[0].function.strict", "boolean"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "array"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters", "object"),
        ({"tools": [function(parameters={"properties": []})]}, "tools[0].function.parameters", "properties"),
        ({"tools": [function(parameters={"properties": {"a": 1}})]}, "tools[0].function.parameters", "schema"),
        ({"tools": [function(parameters={"required": "a"})]}, "tools[0].function.parameters", "names"),
        ({"tools": [NOW, WEATHER, NOW]}, "tools", "tools[0] and tools[2]"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": 1}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": named("fly")}, "tool_choice", "fly"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "now"}}, "tool_choice.function", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": named("now")}, "tool_choice", "now"),
        ({"tools": TOOLS, "parallel_tool_calls": 0}, "parallel_tool_calls", "boolean"),
        ({"functions": [{"name": "f"}]}, "functions", "give tools"),
        ({"function_call": {"name": "f"}}, "function_call", "give tool_choice"),
    ],
)
def test_errors_name_the_field(fields, param, words):
    with pytest.raises(ReplyError) as info:
        body(**fields)
    assert (info.value.status, info.value.param) == (400, param)
    assert words in info.value.message
