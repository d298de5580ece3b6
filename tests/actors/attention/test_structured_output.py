"""Random JSON schemas through the whole engine: every output that ends by itself is valid, to jsonschema's mind.

`ISOTHERM_SCHEMA_CASES` sets how many are drawn."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import jsonschema
import pytest
from grammars import accepts, chat_ids, constrained, outputs, tiny_engine, tiny_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isotherm.cluster.messages.requests import FinishReason
from isotherm.cluster.text.grammar import json_schema
from isotherm.cluster.text.json_schema import GrammarError

CASES = int(os.environ.get("ISOTHERM_SCHEMA_CASES", "30"))
BATCH = 10
SMALL, BOUND = st.integers(0, 6), st.integers(-30, 30)
NAME = st.text("abcdefgh_", min_size=1, max_size=6)
VALUE = st.one_of(st.none(), st.booleans(), st.integers(0, 99), st.text(max_size=4))
PATTERNS = st.sampled_from(["^[a-f]+$", "x", "^(on|off)$", r"^\d{2}-\w$", "[^a-y ]$"])
FORMATS = st.sampled_from(["date", "time", "uuid", "ipv4", "email", "hostname"])


def typed(kind: str, **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas of a type, that have some of the keywords."""
    return st.fixed_dictionaries({"type": st.just(kind)}, optional=keywords)


FLAT = st.one_of(
    typed("string", minLength=st.integers(0, 3), maxLength=SMALL),
    typed("string", pattern=PATTERNS),
    typed("string", format=FORMATS),
    typed("integer", minimum=BOUND, exclusiveMaximum=BOUND, multipleOf=st.sampled_from([2, 5])),
    typed("number", exclusiveMinimum=BOUND, maximum=BOUND),
    typed("boolean"),
    typed("null"),
    st.fixed_dictionaries({"const": VALUE}),
    st.fixed_dictionaries({"enum": st.lists(VALUE, min_size=1, max_size=4, unique_by=repr)}),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some, named = st.lists(inner, min_size=1, max_size=3), st.dictionaries(NAME, inner, max_size=3)
    return st.one_of(
        typed("array", items=inner, minItems=SMALL, maxItems=SMALL),
        typed("array", prefixItems=some, items=st.booleans(), minItems=SMALL),
        typed(
            "object",
            properties=named,
            required=st.lists(NAME, max_size=2, unique=True),
            additionalProperties=st.one_of(st.booleans(), inner),
        ),
        typed("object", additionalProperties=inner, maxProperties=SMALL),
        typed("object", patternProperties=st.fixed_dictionaries({"^[x-z]": inner}), minProperties=st.integers(0, 3)),
        st.fixed_dictionaries({"anyOf": some}),
        st.fixed_dictionaries({"oneOf": some}),
        st.fixed_dictionaries({"allOf": some}),
    )


SCHEMAS = st.recursive(FLAT, larger, max_leaves=6)


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


def test_random_schemas_hold(engine):
    """Those that cannot be had are refused with a reason; at temperature 1, in batches."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    prompt = chat_ids("Give me an object as JSON.")
    drawn: list[Any] = []

    @settings(max_examples=CASES, database=None, suppress_health_check=list(HealthCheck))
    @given(SCHEMAS)
    def draw(schema: Any) -> None:
        drawn.append(schema)

    draw()
    for begin in range(0, len(drawn), BATCH):
        requests, known = [], {}
        for i, schema in enumerate(drawn[begin : begin + BATCH], begin):
            jsonschema.Draft202012Validator.check_schema(schema)
            try:
                grammar = json_schema(schema)
                tiny_vocabulary().check(grammar)
            except GrammarError as error:
                counts["refused"] += 1
                reasons[str(error)[:50]] += 1
                continue
            known[str(i)] = schema
            requests.append(constrained(str(i), prompt, grammar, temperature=1.0, max_tokens=350, seed=i))
        for name, got in outputs(engine, *requests).items():
            assert got.reason in (FinishReason.STOP, FinishReason.LENGTH), (known[name], got)
            counts[got.reason.value] += 1
            if got.reason is FinishReason.STOP:
                jsonschema.Draft202012Validator(known[name]).validate(json.loads(got.text))
    print(f"{len(drawn)} schemas: {dict(counts)}; refused: {dict(reasons.most_common(8))}")
    assert counts["stop"] > counts["length"] and counts["refused"] < 0.5 * len(drawn), counts


def in_order(properties: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Objects with some of the properties, in their order."""
    some = st.fixed_dictionaries({}, optional=properties)
    return some.map(lambda value: {name: value[name] for name in properties if name in value})


POSSIBLE: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (
        {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 1000}, "maxItems": 5},
        st.lists(st.integers(-3, 1000), max_size=5),
    ),
    ({"type": "string", "minLength": 1, "maxLength": 8}, st.text(min_size=1, max_size=8)),
    ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
    (True, st.recursive(VALUE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)),
    (
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": [1, "x"]}, "c": {"type": "boolean"}}},
        in_order({"a": st.text(), "b": st.sampled_from([1, "x"]), "c": st.booleans()}),
    ),
]


@pytest.mark.parametrize(("schema", "values"), POSSIBLE, ids=["array", "string", "number", "any", "object"])
def test_what_is_valid_is_possible(schema, values):
    """With its properties in the schema's order; characters as they are, but DEL escaped."""

    @given(values)
    def each(value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("\x7f", "\\u007f")
        assert accepts(json_schema(schema), text)

    each()
