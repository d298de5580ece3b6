"""Tools as TypeScript: the texts that Kimi K2.5's own tokenizer makes of these schemas."""

from __future__ import annotations

from typing import Any

import pytest

from isotherm.cluster.text.chat_template import ChatTemplate
from isotherm.cluster.text.template_traits import TemplateTraits
from isotherm.cluster.text.typescript_tools import UndeclarableError, declared_tools, sorted_keys


def tool(properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties or {}} | more
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def of_field(schema: Any, **more: Any) -> str:
    """What is declared of a required field `x`."""
    text = declared_tools([tool({"x": schema}, required=["x"], **more)])
    begin, end = "namespace functions {\n", "\n}) => any;\n}\n"
    body = text.partition(begin)[2]
    assert text.startswith("# Tools\n\n## functions\n" + begin) and text.endswith(end)
    return body.removesuffix(end).rpartition("type f = (_: {\n")[2]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, "  x: string"),
        ({"type": "integer"}, "  x: number"),
        ({"type": "number", "minimum": 0, "maximum": 1.5}, "  // maximum: 1.5, minimum: 0\n  x: number"),
        (
            {"type": "string", "pattern": "^a", "minLength": 1, "maximum": 3, "description": "One"},
            "  // One\n  // minLength: 1, pattern: ^a\n  x: string",
        ),
        ({"type": "boolean", "default": True}, "  // Default: True\n  x: boolean"),
        ({"type": "string", "default": "é"}, '  // Default: "é"\n  x: string'),
        ({"type": "number", "default": 0}, "  // Default: 0\n  x: number"),
        ({"type": "array", "items": {}, "default": []}, "  // Default: []\n  x: Array<any>"),
        ({"type": "null", "description": "a\n\nb"}, "  // a\n\n  // b\n  x: null"),
        ({"type": ["string", "integer", "null"]}, "  x: string | number | null"),
        ({"type": ["object", "array"], "description": "d"}, "  // d\n  x: {} | Array<any>"),
        ({"enum": ["a", 1, 2.5, True, None]}, '  x: "a" | 1 | 2.5 | True | None'),
        ({"type": ["null", "string"], "enum": ["a", None]}, '  x: "a" | None'),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "null"}}]}, "  x: string | Array<null>"),
        ({}, "  x: any"),
        (True, "  x: any"),
        (False, "  x: null"),
        ({"type": "array"}, "  x: Array<any>"),
        ({"type": "array", "maxItems": 3, "items": {"type": "string"}}, "  // maxItems: 3\n  x: Array<string>"),
        (
            {"type": "array", "items": {"type": "string", "description": "each"}},
            "  x: Array<\n    // each\n    string\n  >",
        ),
        ({"type": "object"}, "  x: {}"),
        ({"type": "object", "additionalProperties": False}, "  x: {\n    [k: string]: never\n  }"),
        ({"type": "object", "additionalProperties": True}, "  x: {\n    [k: string]: any\n  }"),
        (
            {"type": "object", "properties": {"b": {}, "a": {}, "c": {}}, "required": ["c"],
             "additionalProperties": {"type": "integer"}},
            "  x: {\n    c: any,\n    a?: any,\n    b?: any,\n    [k: string]: number\n  }",
        ),
        ({"type": "of its own", "description": ""}, "  x: of its own"),
    ],
)  # fmt: skip
def test_a_field(schema: Any, text: str):
    assert of_field(schema) == text


def test_tools_with_descriptions_follow_each_other():
    tools = [tool(), tool({"q": {"type": "string"}})]
    tools[0]["function"] |= {"name": "now", "description": "The time\nof day"}
    tools[1]["function"] |= {"name": "search"}
    assert declared_tools(tools) == (
        "# Tools\n\n## functions\nnamespace functions {\n// The time\n// of day\ntype now = (_: {}) => any;\n"
        "type search = (_: {\n  q?: string\n}) => any;\n}\n"
    )


def test_what_is_no_function_is_left_out():
    assert declared_tools([{"type": "_plugin"}, {"type": "function", "function": {}}]) == ""
    only_named = {"type": "function", "function": {"name": "f"}}
    assert declared_tools([only_named]).count("type f = (_: {}) => any;") == 1


def test_definitions_are_interfaces():
    node = {"type": "object", "description": "A node", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    text = declared_tools(
        [tool({"head": {"$ref": "#/$defs/Node", "description": "first"}}, **{"$defs": {"Node": node}})]
    )
    assert text == (
        "# Tools\n\n## functions\nnamespace functions {\n// A node\ninterface Node {\n  next?: Node\n}\n"
        "type f = (_: {\n  // first\n  head?: Node\n}) => any;\n}\n"
    )


def test_parameters_that_refer_to_themselves_are_an_interface():
    text = declared_tools([tool({"b": {"$ref": "#"}, "a": {"type": "string"}}, required=["a"])])
    assert "interface parameters {\n  b?: parameters,\n  a: string\n}\ntype f = (_: parameters) => any;\n" in text


@pytest.mark.parametrize(
    "schema",
    [
        {"description": "no type"},
        {"$ref": "#/$defs/Absent"},
        {"$ref": "https://example.com/schema"},
        {"type": ["string", "unheard of"]},
        {"type": "string", "enum": [1]},
        {"type": ["string", "integer"], "enum": ["a"]},
        {"type": "array", "items": {"oneOf": []}},
        "string",
        {"type": "string", "description": ["a"]},
    ],
)
def test_what_has_no_declaration(schema: Any):
    with pytest.raises(UndeclarableError):
        declared_tools([tool({"x": schema})])


def test_a_schema_without_end_has_none():
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UndeclarableError, match="nested too deeply"):
        declared_tools([tool({"x": deep})])


def test_keys_are_in_order_and_lists_as_they_were():
    assert str(sorted_keys({"b": [{"d": 1, "c": 2}, 3], "a": None})) == "{'a': None, 'b': [{'c': 2, 'd': 1}, 3]}"


# --- for a template ---------------------------------------------------------------------------------

K25 = "{% if tools_ts_str %}{{ tools_ts_str }}{% elif tools %}{{ tools | tojson }}{% endif %}"
JSON_ONLY = "{% if tools %}{{ tools | tojson }}{% endif %}"
UNSORTED = [{"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, "name": "f"}}]


def rendered(source: str, tools: Any, *, sorts_tools: bool = False) -> str:
    traits = TemplateTraits(ChatTemplate({"default": source}), "default", sorts_tools=sorts_tools)
    return traits.render({"messages": [], "tools": tools}).text


def test_a_template_that_wants_them_is_given_them():
    assert rendered(K25, UNSORTED) == declared_tools(UNSORTED).removesuffix("\n") + "\n"
    assert rendered(K25, None) == rendered(K25, []) == ""
    traits = TemplateTraits(ChatTemplate({"default": K25}), "default")
    assert traits.declares_tools and traits.supports_tools
    assert not TemplateTraits(ChatTemplate({"default": JSON_ONLY}), "default").declares_tools


def test_a_schema_without_a_declaration_is_told_as_json():
    odd = [tool({"x": {"description": "no type"}})]
    assert rendered(K25, odd).startswith('[{"function": {"name": "f", "parameters": {"properties": {"x": {"des')


def test_keys_are_sorted_for_those_who_do_it():
    assert rendered(JSON_ONLY, UNSORTED).startswith('[{"type"')
    assert rendered(JSON_ONLY, UNSORTED, sorts_tools=True).startswith('[{"function": {"name"')
