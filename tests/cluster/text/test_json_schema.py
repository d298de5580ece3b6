"""Schemas as llguidance takes them: what is left out, what is rewritten, and what is refused by name."""

from __future__ import annotations

import json

import jsonschema
import pytest
from grammars import accepts, tiny_vocabulary

from isotherm.cluster.text.grammar import json_schema
from isotherm.cluster.text.json_schema import FORMATS, UNSUPPORTED, GrammarError, plain_schema

CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "name": {"type": "string"}}, "required": ["kind"]}


@pytest.mark.parametrize("keyword", sorted(UNSUPPORTED))
def test_a_keyword_that_is_not_enforced_is_named_with_its_place(keyword):
    with pytest.raises(GrammarError, match=rf"'{keyword.replace('$', '.')}' is not supported \(at /properties/a"):
        plain_schema({"type": "object", "properties": {"a": {keyword: {"enum": ["b"], "lenient": True}}}})


@pytest.mark.parametrize("names", [{"type": "string"}, {}, True])
def test_names_that_may_be_any_are_taken(names):
    """As zod writes every record."""
    record = {"type": "object", "additionalProperties": {"type": "integer"}}
    assert plain_schema({**record, "propertyNames": names}) == record


def test_titles_in_the_place_of_names_are_left_out():
    """griptape writes "Output Format" into each schema's $id."""
    number = {"type": "integer"}
    assert plain_schema({**number, "$id": "Output Format", "$schema": "my schema"}) == number
    named = {"$id": "https://example.com/n.json", "$schema": "https://json-schema.org/draft/2020-12/schema", **number}
    assert plain_schema(named) == named
    assert accepts(json_schema({**number, "$id": "Output Format"}), "7")


def test_how_guidance_would_have_json_spaced_is_a_hint():
    spaced = {"whitespace_flexible": False, "item_separator": ", ", "coerce_one_of": True, "lenient": False}
    assert plain_schema({"type": "object", "x-guidance": spaced}) == {"type": "object"}
    with pytest.raises(GrammarError, match="'x-guidance' is not supported"):
        plain_schema({"type": "object", "x-guidance": {"lenient": True}})


def test_a_pattern_says_what_an_unknown_format_means():
    """zod's cuid, ulid, base64, … have one; without it what is meant is not known."""
    coded = {"type": "string", "pattern": "^[cC][0-9a-z]{6,}$"}
    assert plain_schema({**coded, "format": "cuid"}) == coded
    assert plain_schema({"type": "string", "format": "cuid"}) == {"type": "string", "format": "cuid"}
    assert plain_schema({**coded, "format": "uuid"}) == {**coded, "format": "uuid"}


def test_of_a_pattern_that_looks_ahead_beside_a_format_the_format_is_left():
    """As zod writes an email."""
    zods = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    email = {"type": "string", "format": "email"}
    assert plain_schema({**email, "pattern": zods}) == email
    assert accepts(json_schema({**email, "pattern": zods}), '"a@b.org"')
    assert not accepts(json_schema({**email, "pattern": zods}), '"a@b@org"')
    kept = {"type": "string", "pattern": zods}
    assert plain_schema(kept) == kept, "and refused by the compiler"
    assert plain_schema({**email, "pattern": "org$"}) == {**email, "pattern": "org$"}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_are_those_that_are_enforced(name):
    assert not tiny_vocabulary().fresh_matcher(json_schema({"type": "string", "format": name})).is_error()


def test_another_format_is_refused():
    assert tiny_vocabulary().fresh_matcher(json_schema({"type": "string", "format": "cuid"})).is_error()


WORDS = {"type": "object", "additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize(
    "schema",
    [
        {**WORDS, "minProperties": 2},
        {"minProperties": 2},
        {"type": ["object", "null"], "minProperties": 3, "required": ["a", "a"]},
        {"type": "object", "patternProperties": {"^s_": {}}, "minProperties": 2, "additionalProperties": False},
    ],
)
def test_keys_that_may_come_twice_are_not_counted(schema):
    """`{"x": 1, "x": 2}` has two keys while it is written, and one when it is read."""
    with pytest.raises(GrammarError, match=r"'minProperties' is not supported beyond .* \(at the top of the schema\)"):
        plain_schema(schema)


def test_one_key_beyond_the_required_ones_can_be_counted():
    written = json_schema({**WORDS, "minProperties": 2, "required": ["a"]})
    assert accepts(written, '{"a":1,"b":2}') and not accepts(written, '{"a":1}')
    assert not accepts(written, '{"a":1,"a":2}')
    marked = {"type": "object", "patternProperties": {"^s_": {"type": "null"}}, "additionalProperties": False}
    written = json_schema({**marked, "minProperties": 2, "required": ["s_a"]})
    assert accepts(written, '{"s_a":null,"s_b":null}') and not accepts(written, '{"s_a":null}')
    assert not accepts(written, '{"s_a":null,"s_a":null}')
    assert plain_schema({"type": "string", "minProperties": 9}) == {"type": "string", "minProperties": 9}


def test_names_of_properties_and_values_are_no_keywords():
    schema = {
        "type": "object",
        "properties": {"not": {"enum": [{"if": 1}]}, "contains": {"const": {"uniqueItems": True}}},
        "required": ["not"],
    }
    assert plain_schema(schema) == schema


def test_annotations_are_left_out_and_what_says_nothing_too():
    schema = {
        "title": "T",
        "description": "d",
        "x-order": [1],
        "deprecated": True,
        "type": "array",
        "uniqueItems": False,
        "items": {"type": "string", "examples": ["a"], "default": "b"},
    }
    assert plain_schema(schema) == {"type": "array", "items": {"type": "string"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [CAT, DOG]},
        {
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"Cat": CAT, "Dog": DOG},
        },
    ],
    ids=["inline", "as pydantic writes it"],
)
def test_a_union_that_is_told_by_a_tag_is_one_of_them(schema):
    written = json_schema(schema)
    assert accepts(written, '{"kind":"cat","lives":9}') and accepts(written, '{"kind":"dog","name":"Rex"}')
    assert not accepts(written, '{"kind":"fish"}')


def test_options_that_may_hold_together_stay_one_of_them():
    both = {"oneOf": [CAT, {**DOG, "properties": {"kind": {"enum": ["dog", "cat"]}}}]}
    assert "oneOf" in plain_schema(both)
    untold = {"oneOf": [{**CAT, "required": []}, DOG]}
    assert "oneOf" in plain_schema(untold)


# Keywords, values that are valid by them, and values that are not.
KEYWORDS = [
    ({"type": "string"}, ["", "a", 'q"\\\n\té😀\u0001'], [1, None, []]),
    ({"type": "integer"}, [0, -5, 123456789], [1.5, "1", True]),
    ({"type": "number"}, [0, -1.5, 2e10], ["1", False]),
    ({"type": "boolean"}, [True, False], [0, "true"]),
    ({"type": "null"}, [None], [0, ""]),
    ({"type": ["string", "null"]}, ["a", None], [1]),
    ({"enum": ["a", 1, None, {"b": [2]}]}, ["a", 1, None, {"b": [2]}], ["b", 2]),
    ({"const": "only"}, ["only"], ["on", "only "]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc", "é😀"], ["a", "abcd", ""]),
    ({"type": "string", "pattern": "^[a-c]+$"}, ["abc"], ["abd", ""]),
    ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-2-29", "x"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-29T12:00:00Z"], ["2024-02-29"]),
    ({"type": "string", "format": "email"}, ["a@b.org"], ["a.org"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["300.0.0.1"]),
    ({"type": "integer", "minimum": 3, "maximum": 12}, [3, 7, 12], [2, 13]),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 12}, [4, 11], [3, 12]),
    ({"type": "number", "minimum": -0.5, "maximum": 0.5}, [-0.5, 0, 0.25], [-0.6, 1]),
    ({"type": "integer", "multipleOf": 5}, [0, 10, -5], [3]),
    ({"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"], [1, "a"]]),
    ({"type": "array", "items": False}, [[]], [[1]]),
    ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], ["a", None]], [[], [1, 2, 3]]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
        [[1, "a"]],
        [[1], ["a", 1], [1, "a", 2]],
    ),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"a": 1}],
        [{"b": 1}, {"a": "x"}],
    ),
    ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": None, "b": 2}], [{}, {"b": 2}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"x": 1}, {}], [{"x": "1"}]),
    (
        {"type": "object", "patternProperties": {"^s_": {"type": "string"}}, "additionalProperties": False},
        [{"s_a": "x"}],
        [{"s_a": 1}, {"t": "x"}],
    ),
    ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    ({"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [5, "a"], ["ab", None]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [5, "a"], [None, 1.5]),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6, "a"]),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}},
        [[], [[], [[]]]],
        [[1], 1],
    ),
    (
        {"type": "object", "properties": {"a": {"$ref": "#/definitions/x"}}, "definitions": {"x": {"type": "null"}}},
        [{"a": None}],
        [{"a": 1}],
    ),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), KEYWORDS, ids=lambda value: json.dumps(value)[:60])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "spaced"])
def test_a_keyword_means_what_it_means(schema, valid, invalid, separators):
    """To llguidance as to jsonschema."""
    written = json_schema(schema)
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for values, expected in ((valid, True), (invalid, False)):
        for value in values:
            if "format" not in schema:
                assert judge.is_valid(value) is expected
            assert accepts(written, json.dumps(value, separators=separators, ensure_ascii=False)) is expected, value
