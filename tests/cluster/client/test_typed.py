"""Types as schemas, and JSON text as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from isotherm.cluster.client import OutputInvalidError, ToolCall, tool
from isotherm.cluster.client.typed import as_tool, checked_json, response_format


class Leaf(BaseModel):
    name: str
    properties: dict[str, int] = {}  # a field that is named as a keyword of JSON Schema is


class Cat(BaseModel):
    kind: Literal["cat"]


class Tree(BaseModel):
    leaves: list[Leaf]
    left: Tree | None = None
    discriminator: int = 3


@dataclass
class Point:
    x: float
    y: float = 0.0


def schema_of(kind):
    found = response_format(kind)
    assert found["type"] == "json_schema" and found["json_schema"]["strict"] is True
    Draft202012Validator.check_schema(found["json_schema"]["schema"])
    return found["json_schema"]


def test_a_models_schema_takes_what_the_model_takes_and_no_more():
    named = schema_of(Tree)
    assert named["name"] == "Tree"
    validator = Draft202012Validator(named["schema"])
    good = {"leaves": [{"name": "a", "properties": {"p": 1}}], "left": {"leaves": []}, "discriminator": 4}
    assert validator.is_valid(good) and Tree.model_validate(good)
    for bad in ({**good, "more": 1}, {"leaves": [{"name": "a", "more": 1}]}, {"left": None}):
        assert not validator.is_valid(bad)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Point, '{"x": 1}', Point(1.0)),
        (list[int], "[1, 2]", [1, 2]),
        (Literal["a", "b"], '"b"', "b"),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Cat, '{"kind": "cat"}', Cat(kind="cat")),
    ],
)
def test_any_type_that_pydantic_knows(kind, text, value):
    name = schema_of(kind)["name"]
    assert name and all(character.isalnum() or character in "_-" for character in name)
    assert checked_json(kind, text, "it") == value


def test_text_that_does_not_fit_is_told_with_what_is_wrong():
    with pytest.raises(OutputInvalidError, match=r"the reply: leaves\.0\.name: .*valid string") as info:
        checked_json(Tree, '{"leaves": [{"name": 5}]}', "the reply")
    assert info.value.text == '{"leaves": [{"name": 5}]}'
    with pytest.raises(OutputInvalidError, match="Invalid JSON"):
        checked_json(Tree, '{"leaves": [', "the reply")


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """The weather of a city.

    For some days."""
    if days > 9:
        raise ValueError("too far")
    return f"{city} {days} {unit}"


def test_a_function_is_a_tool():
    entry = tool(weather)
    assert entry["type"] == "function" and entry["function"]["name"] == "weather"
    assert entry["function"]["description"] == "The weather of a city.\n\nFor some days."
    parameters = entry["function"]["parameters"]
    assert parameters["required"] == ["city"] and parameters["additionalProperties"] is False
    assert parameters["properties"]["unit"]["enum"] == ["C", "F"]
    assert as_tool(weather) == entry and as_tool(entry) is entry


def test_a_call_is_run_with_checked_arguments():
    assert ToolCall("c", "weather", '{"city": "Oslo", "unit": "F"}').run(weather) == "Oslo 1 F"
    with pytest.raises(OutputInvalidError, match="the arguments of weather: days"):
        ToolCall("c", "weather", '{"city": "Oslo", "days": "many"}').run(weather)
    with pytest.raises(OutputInvalidError, match="Unexpected keyword"):
        ToolCall("c", "weather", '{"city": "Oslo", "wind": 1}').run(weather)
    with pytest.raises(ValueError, match="too far"):  # the function's own
        ToolCall("c", "weather", '{"city": "Oslo", "days": 10}').run(weather)


def test_a_calls_arguments_and_result():
    call = ToolCall("c1", "f", '{"a": 1}')
    assert call.parsed() == {"a": 1} and call.parsed(dict[str, int]) == {"a": 1}
    assert ToolCall("c", "f", "").parsed() == {}  # a function without parameters
    assert call.result("é") == {"role": "tool", "tool_call_id": "c1", "content": "é"}
    assert call.result({"t": "é"})["content"] == '{"t": "é"}'
    with pytest.raises(OutputInvalidError):
        ToolCall("c", "f", "[1]").parsed()


def test_a_set_is_a_list_for_a_grammar_and_a_set_again_for_who_asked():
    schema = response_format(set[int])["json_schema"]["schema"]
    assert "uniqueItems" not in schema
    assert checked_json(set[int], "[1, 2, 2]", "the reply") == {1, 2}


def test_a_function_that_json_cannot_call_is_named():
    def total(*numbers: int) -> int:
        return sum(numbers)

    def spread(*numbers: int, **named: int) -> int:
        return total(*numbers, *named.values())

    with pytest.raises(TypeError, match="spread: "):
        tool(spread)
