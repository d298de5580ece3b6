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
from hypothesis_jsonschema import from_schema

from isotherm.cluster.messages.requests import FinishReason
from isotherm.cluster.text.grammar import json_schema
from isotherm.cluster.text.json_schema import GrammarError

CASES = int(os.environ.get("ISOTHERM_SCHEMA_CASES", "30"))
BATCH = 10
SMALL = {"type": "integer", "minimum": 0, "maximum": 6}
NAME = {"type": "string", "pattern": "^[a-z_]{1,6}$"}


def one_of(kind: str | None, **keywords: Any) -> dict[str, Any]:
    """A schema of schemas: those of a type, that may have the keywords."""
    fixed = {} if kind is None else {"type": {"const": kind}}
    return {
        "type": "object",
        "properties": {**fixed, **keywords},
        "required": list(fixed) if kind is not None else list(keywords),
        "additionalProperties": False,
    }


def schemas(depth: int) -> dict[str, Any]:
    """A schema of the schemas that are enforced, so deep."""
    values = {"anyOf": [{"type": "null"}, {"type": "boolean"}, SMALL, {"type": "string", "maxLength": 4}]}
    texts = [
        one_of("string", minLength={"type": "integer", "minimum": 0, "maximum": 3}, maxLength=SMALL),
        one_of("string", pattern={"enum": ["^[a-f]+$", "x", "^(on|off)$", r"^\d{2}-\w$", "[^a-y ]$"]}),
        one_of("string", format={"enum": ["date", "time", "uuid", "ipv4", "email", "hostname"]}),
    ]
    bounds = {"type": "integer", "minimum": -30, "maximum": 30}
    numbers = [
        one_of("integer", minimum=bounds, exclusiveMaximum=bounds, multipleOf={"enum": [2, 5]}),
        one_of("number", exclusiveMinimum=bounds, maximum=bounds),
    ]
    others = [
        one_of("boolean"),
        one_of("null"),
        one_of(None, const=values),
        one_of(None, enum={"type": "array", "items": values, "minItems": 1, "maxItems": 4}),
    ]
    flat = {"anyOf": [*texts, *numbers, *others]}
    if depth == 0:
        return flat
    inner = schemas(depth - 1)
    some = {"type": "array", "items": inner, "minItems": 1, "maxItems": 3}
    named = {"type": "object", "propertyNames": NAME, "additionalProperties": inner, "maxProperties": 3}
    names = {"type": "array", "items": NAME, "maxItems": 2}
    more = {"anyOf": [{"type": "boolean"}, inner]}
    return {
        "anyOf": [
            one_of("array", items=inner, minItems=SMALL, maxItems=SMALL),
            one_of("array", prefixItems=some, items={"type": "boolean"}),
            one_of("object", properties=named, required=names, additionalProperties=more),
            one_of("object", additionalProperties=inner, maxProperties=SMALL),
            one_of(None, anyOf=some),
            flat,
        ]
    }


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
    @given(from_schema(schemas(2)))
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
    assert counts["stop"] > 0.5 * len(drawn), counts


@settings(max_examples=max(20, CASES // 5))
@given(st.data())
def test_what_is_valid_is_possible(data):
    """Of a few schemas, instances by hypothesis-jsonschema: with its properties in the schema's order each can come."""
    schema = data.draw(
        st.sampled_from(
            [
                {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 1000}, "maxItems": 5},
                {"type": "string", "minLength": 1, "maxLength": 8},
                {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": {"type": "string"}},
                {
                    "type": "object",
                    "properties": {"a": {"type": "string"}, "b": {"enum": [1, "x", None]}, "c": {"type": "boolean"}},
                    "required": ["b"],
                    "additionalProperties": False,
                },
            ]
        )
    )
    value = data.draw(from_schema(schema))
    if isinstance(value, dict):
        value = {name: value[name] for name in schema["properties"] if name in value}
    assert accepts(json_schema(schema), json.dumps(value, ensure_ascii=False, separators=(",", ":")))
