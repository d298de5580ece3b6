"""What bodies ask their output to be: every server's names for it, one at a time, checked before anything is queued."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import write_tokenizer
from grammars import accepts, tiny_tokenizer

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.prepare import Prepared, PromptLimits, Served
from isotherm.cluster.api.prepare_chat import prepare_chat
from isotherm.cluster.api.prepare_completion import prepare_completion
from isotherm.cluster.messages.requests import Constraint, SamplingParams
from isotherm.cluster.text.grammar import MOST_CHARS
from isotherm.cluster.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LIMITS = PromptLimits(max_model_len=512, vocab_size=1280, max_prompt_chars=5000)


def chat(**fields: Any) -> Prepared:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return prepare_chat(json.dumps(body).encode(), "id", Served({"m"}, tiny_tokenizer(), LIMITS))


def complete(**fields: Any) -> Prepared:
    body = {"model": "m", "prompt": "hi", **fields}
    return prepare_completion(json.dumps(body).encode(), "id", Served({"m"}, tiny_tokenizer(), LIMITS))


def params(prepared: Prepared) -> SamplingParams:
    return prepared.requests[0].params


def constraint(prepared: Prepared) -> Constraint:
    found = params(prepared).constraint
    assert found is not None
    return found


@pytest.mark.parametrize("prepare", [chat, complete])
@pytest.mark.parametrize(
    ("fields", "whole", "other"),
    [
        ({"response_format": {"type": "json_object"}}, '{"b": 1}', "[]"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '{"a": 1}', '{"b": 1}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, '{"a":1}', "{}"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
            '{"a":1}',
            "{}",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a":1}', "{}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":1}', "{}"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"structured_outputs": {"regex": "a+"}}, "aa", "b"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"', "json": None}}, "ab", "a"),
        ({"guided_json": SCHEMA}, '{"a":1}', "{}"),
        ({"guided_json": json.dumps(SCHEMA)}, '{"a":1}', "{}"),
        ({"guided_regex": "a+"}, "aa", "b"),
        ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "b", "ab"),
        ({"regex": "^a+$"}, "aa", "b"),
        ({"ebnf": 'root ::= "a" root | "b"'}, "aab", "a"),
        ({"grammar": 'root ::= "a" | "b"'}, "b", "ab"),
        ({"json_schema": json.dumps(SCHEMA)}, '{"a":1}', "{}"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_every_name_for_it_is_honoured(prepare, fields, whole, other):
    found = constraint(prepare(**fields))
    assert found.after == ()
    assert accepts(found.grammar, whole) and not accepts(found.grammar, other)


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None}]
)
def test_who_asks_for_nothing_has_no_constraint(fields):
    assert params(chat(**fields)).constraint is None and params(complete(**fields)).constraint is None


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "'not' is not supported",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "("),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "give one of them"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex", "response_format"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": []}, "guided_json", "object"),
        *(
            (fields, param, "must be a JSON schema by which something is valid: an object, or true, got false")
            for fields, param in (
                ({"guided_json": False}, "guided_json"),
                (
                    {"response_format": {"type": "json_schema", "json_schema": {"schema": False}}},
                    "response_format.json_schema.schema",
                ),
            )
        ),
        ({"guided_json": "false"}, "guided_json", "an object, or true for any JSON, got false"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "never ends"),
        ({"guided_regex": "a" * (MOST_CHARS + 1)}, "guided_regex", f"at most {MOST_CHARS}"),
        ({"guided_grammar": "start: x"}, "guided_grammar", '"x"'),
        ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern", "not supported"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
        ({"response_format": "json_object"}, "response_format", "json_schema"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_refused_by_name(fields, param, says):
    for prepare in (chat, complete):
        with pytest.raises(ReplyError) as refused:
            prepare(**fields)
        assert refused.value.status == 400 and refused.value.param == param
        assert says in refused.value.message and "\n" not in refused.value.message


def test_in_a_chat_that_thinks_it_begins_after_the_thought():
    asked = {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"thinking": True}}
    close = tiny_tokenizer().token_id("</think>")
    assert constraint(chat(**asked)).after == (close,)
    assert constraint(chat(**asked, separate_reasoning=False)).after == (close,)


def test_after_a_thought_whose_end_is_no_token_nothing_can_be_held(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "regex": "a+"}
    try:
        for thinking in (False, True):
            raw = json.dumps({**body, "chat_template_kwargs": {"thinking": thinking}}).encode()
            if thinking:
                with pytest.raises(ReplyError, match="regex: not with thinking: </think> is no token"):
                    prepare_chat(raw, "id", Served({"m"}, tokenizer, LIMITS))
            else:
                assert constraint(prepare_chat(raw, "id", Served({"m"}, tokenizer, LIMITS))).after == ()
    finally:
        tokenizer.chat_template.close()


def test_the_text_ends_where_its_grammar_lets_it_whoever_ignores_the_end():
    ends = tuple(sorted(tiny_tokenizer().eos_token_ids))
    assert params(chat(regex="a+", ignore_eos=True, stop_token_ids=[9])).stop_token_ids == tuple(sorted({*ends, 9}))
    assert params(chat(ignore_eos=True)).stop_token_ids == ()
