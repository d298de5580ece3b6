from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.text.tool_formats.values import Known, argument, as_json, branches, types

ROOT = {
    "properties": {"a": {"type": "string"}},
    "$defs": {"size": {"enum": ["s", "l"]}, "loop": {"$ref": "#/$defs/loop"}, "a/b": {"type": "null"}},
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "null"}),
        ({"const": 1.5}, {"number"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"anyOf": [{"type": "string"}, {}]}, set()),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, {"string"}),
        ({"$ref": "#/$defs/size"}, {"string"}),
        ({"$ref": "#/properties/a"}, {"string"}),
        ({"$ref": "#/$defs/a~1b"}, {"null"}),
        ({"$ref": "#/$defs/nowhere"}, set()),
        ({"$ref": "https://example.com/x"}, set()),
        ({"$ref": "#/$defs/loop"}, set()),
        ({"properties": {}}, {"object"}),
        ({}, set()),
        (True, set()),
        (None, set()),
        ({"type": [1, "string"]}, {"string"}),
    ],
)
def test_the_types_of_a_schema(schema, expected):
    assert types(schema, ROOT) == expected


@pytest.mark.parametrize(
    ("raw", "allowed", "expected"),
    [
        ("3", {"integer"}, "3"),
        ("3.0", {"integer"}, "3.0"),
        ("3", {"number"}, "3"),
        ("3", {"string"}, '"3"'),
        ('"3"', {"string"}, '"3"'),
        ("3", set(), "3"),
        ("three", set(), '"three"'),
        ("NaN", {"number"}, '"NaN"'),
        ("True", {"boolean"}, "true"),
        ("None", {"null", "integer"}, "null"),
        ("{'a': [1, None]}", {"object"}, '{"a": [1, null]}'),
        ("(1, 2)", {"array"}, '"(1, 2)"'),
        ("007", {"integer"}, '"007"'),
        (' {"a":  1} ', {"object"}, '{"a":  1}'),
        ("[1", {"array"}, '"[1"'),
        ("true", {"string", "null"}, '"true"'),
        ("[" * 5000, {"array"}, json.dumps("[" * 5000)),
        ("['\\ud83d']", {"array"}, "\"['\\\\ud83d']\""),
        ("'\\ud83d\\ude00'", set(), "\"'\\\\ud83d\\\\ude00'\""),
    ],
)
def test_what_bare_text_stands_for(raw, allowed, expected):
    assert as_json(raw, frozenset(allowed)) == expected


@given(st.text(), st.frozensets(st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])))
def test_it_is_json_whatever_is_written(raw, allowed):
    json.loads(as_json(raw, allowed).encode())


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_json_of_a_type_that_may_be_stays(value):
    assert as_json(json.dumps(value), frozenset()) == json.dumps(value)


def test_the_schema_of_an_argument():
    assert argument(ROOT, "a") == {"type": "string"}
    assert argument(ROOT, "b") is None
    assert argument({"additionalProperties": {"type": "null"}}, "b") == {"type": "null"}
    assert argument({"properties": 5}, "b") is None


def test_branches_are_the_alternatives_by_type():
    assert branches({"type": ["string", "null"], "title": "t"}, ROOT) == [
        {"type": "string", "title": "t"},
        {"type": "null", "title": "t"},
    ]
    nested = {"anyOf": [{"$ref": "#/$defs/size"}, {"oneOf": [{"type": "null"}, {"type": "integer"}]}], "default": None}
    assert branches(nested, ROOT) == [ROOT["$defs"]["size"], {"type": "null"}, {"type": "integer"}]
    kept = {"anyOf": [{"type": "null"}], "minimum": 1}
    assert branches(kept, ROOT) == [kept] and branches(True, ROOT) == [True]


def looped(options: int) -> dict:
    loop = [{"$ref": "#/$defs/a"}] * options
    return {"$defs": {"a": {"anyOf": [*loop, {"type": "string"}, {"type": ["null", "integer"]}]}}}


def chained(options: int, steps: int = 4) -> dict:
    """Each of the definitions is one of many of the next."""
    defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"} for _ in range(options)]} for i in range(steps)}
    return {"$defs": {**defs, f"d{steps}": {"type": "string"}}}


def test_references_by_many_ways_are_gone_into_once():
    begun = time.process_time()
    for root, first in ((looped(60), "a"), (chained(60), "d0")):
        schema = {"$ref": f"#/$defs/{first}"}
        types(schema, root)
        assert len(branches(schema, root)) < 100
    assert time.process_time() - begun < 1  # 60^4 ways


def test_what_is_referred_to_by_several_ways_is_one_branch():
    root = chained(3, 2)
    assert branches({"$ref": "#/$defs/d0"}, root) == [{"type": "string"}]
    assert types({"$ref": "#/$defs/d0"}, root) == {"string"}
    of_a = {"$ref": "#/$defs/a"}
    kinds = [{"type": "string"}, {"type": "null"}, {"type": "integer"}]
    assert branches(of_a, looped(0)) == kinds and types(of_a, looped(0)) == {"string", "null", "integer"}
    known: Known = {}
    assert [types(kind, root, known) for kind in kinds] == [{"string"}, {"null"}, {"integer"}]
