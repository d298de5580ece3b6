"""The public JSON-Schema test suite (draft 2020-12; tests/data/json_schema_suite.json has where it is from, and its
license): what a grammar lets through is valid, and so is what the bundled model writes by it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammars import accepts, chat_ids, constrained, outputs, tiny_engine, tiny_vocabulary

from isotherm.cluster.messages.requests import FinishReason
from isotherm.cluster.text.grammar import json_schema
from isotherm.cluster.text.json_schema import GrammarError

SUITE: dict[str, list[Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "json_schema_suite.json").read_text("utf-8")
)["keywords"]
# Valid instances that no grammar of ours writes: properties in another order than the schema's, whole numbers with a
# point, and texts that their format forbids, which the suite takes for annotations.
MOST_UNWRITTEN = 22
BATCH = 16


def grammar_of(schema: Any) -> str | None:
    """None where the schema is refused."""
    try:
        grammar = json_schema(schema)
        tiny_vocabulary().check(grammar)
    except GrammarError:
        return None
    return grammar


def test_an_invalid_instance_is_never_let_through():
    counts: Counter[str] = Counter()
    for keyword, cases in SUITE.items():
        for case in cases:
            grammar = grammar_of(case["schema"])
            counts["refused" if grammar is None else "taken"] += 1
            for test in case["tests"] if grammar is not None else ():
                let_through = accepts(grammar, json.dumps(test["data"], ensure_ascii=False))
                assert test["valid"] or not let_through, (keyword, case["description"], test["data"])
                counts["unwritten" if test["valid"] and not let_through else "right"] += 1
    print(dict(counts))
    assert counts["unwritten"] <= MOST_UNWRITTEN and counts["taken"] >= 171, counts


@pytest.mark.slow
def test_what_the_model_writes_is_valid():
    engine, prompt = tiny_engine(), chat_ids("Give me a value as JSON.")
    known = {}
    requests = []
    for keyword, cases in SUITE.items():
        for i, case in enumerate(cases):
            if r"\\p{" in json.dumps(case["schema"]):
                continue  # a class of characters that Python's own expressions, by which jsonschema validates, lack
            if (grammar := grammar_of(case["schema"])) is not None:
                name = f"{keyword}-{i}"
                known[name] = case["schema"]
                requests.append(constrained(name, prompt, grammar, temperature=1.0, max_tokens=120, seed=len(known)))
    counts: Counter[str] = Counter()
    for begin in range(0, len(requests), BATCH):
        for name, got in outputs(engine, *requests[begin : begin + BATCH]).items():
            assert got.reason in (FinishReason.STOP, FinishReason.LENGTH), (known[name], got)
            counts[got.reason.value] += 1
            if got.reason is FinishReason.STOP:
                jsonschema.Draft202012Validator(known[name]).validate(json.loads(got.text))
    print(dict(counts))
    assert counts["stop"] > counts["length"], counts
