"""What clients ask for, as grammars: which texts are whole by them, and what is refused, in which words."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from grammars import accepts, tiny_tokenizer, tiny_vocabulary

from isotherm.cluster.text import grammar
from isotherm.cluster.text.grammar import MOST_CHARS, choice, json_object, json_schema, literal, regex
from isotherm.cluster.text.json_schema import GrammarError

CALLS, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("{}", True),
        ('{"a":1}', True),
        ('{"a": 1, "b": [true, null, {"c": "d"}]}', True),
        ('{"a":', False),
        ("[]", False),
        ('{"a":  1}', False),
        ('{ "a":1}', False),
        ('{"a":1,\n"b":2}', False),
        ("", False),
        ("{}\n", False),
    ],
)
def test_a_json_object_is_on_one_line_with_a_space_at_most(text, whole):
    assert accepts(json_object(), text) is whole


@pytest.mark.parametrize(
    ("text", "whole"), [('{"a": 5, "b": [1]}', True), ('{"a":5}', True), ('{"b":[]}', False), ('{"a":"5"}', False)]
)
def test_a_schema_holds(text, whole):
    assert accepts(json_schema(OBJECT), text) is whole


def test_any_json_is_a_schema_too():
    assert all(accepts(json_schema(True), text) for text in ("1", '"a"', "null", "[{}]"))


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        (r"\d{3}-\d{4}", ["555-1234"], ["555-123", "x555-1234", "555-12345"]),
        (r"^(yes|no)$", ["yes", "no"], ["maybe", "yesno"]),
        (r"a/b\$", ["a/b$"], ["a/b"]),
        (r"[a-z ]+\.", ["it is so."], ["It is so.", "it is so"]),
        ("naïve|日本", ["naïve", "日本"], ["naive"]),
    ],
)
def test_a_regular_expression_is_of_the_whole_text(pattern, texts, others):
    assert [text for text in [*texts, *others] if accepts(regex(pattern), text)] == texts


def test_a_choice_is_taken_letter_by_letter():
    options = ["red", "dark red", 'say "hi"', "back\\slash", "two\nlines", "é😀", "\x7f", "<think>"]
    written = choice(options)
    tiny_vocabulary().check(written)
    assert all(
        accepts(written, option) for option in options if option != "<think>"
    )  # that is a token as it is encoded
    assert not any(accepts(written, text) for text in ("redd", "re", "dark", ""))


@pytest.mark.parametrize("text", ["<think>", "</think>", CALLS, "<｜end▁of▁sentence｜>", "a</think>b"])
def test_the_text_of_a_control_token_is_spelt_out(text):
    """In a constant of a schema, in a choice: never the token itself."""
    token = tiny_tokenizer().token_id(text.strip("ab"))
    spelt = [id_ for char in text for id_ in tiny_tokenizer().encode(char, add_special_tokens=False)]
    assert token is not None and token not in spelt
    for written, ids in ((choice([text]), spelt), (json_schema({"const": text}), None)):
        tiny_vocabulary().check(written)
        matcher = tiny_vocabulary().compiled(written).copy()
        assert not matcher.deep_copy().try_consume_tokens([token])
        if ids is not None:
            assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def given(text: str) -> str:
    return grammar.grammar(text, tiny_tokenizer().control_tokens)


EBNF = 'root ::= greeting " " name\ngreeting ::= "hello" | "good day"\nname ::= [A-Z] [a-z]+\n'
LARK = 'start: greeting " " NAME\ngreeting: "hello" | "good day"\nNAME: /[A-Z][a-z]+/\n'


@pytest.mark.parametrize("text", [EBNF, LARK], ids=["EBNF", "Lark"])
def test_grammars_are_lark_or_ebnf(text):
    written = given(text)
    assert accepts(written, "good day Ada") and accepts(written, "hello Bo")
    assert not accepts(written, "hello bo") and not accepts(written, "hello")


@pytest.mark.parametrize(
    ("make", "value", "says"),
    [
        (regex, "(", "regex"),
        (regex, "a" * (MOST_CHARS + 1), f"has {MOST_CHARS + 1} characters; at most {MOST_CHARS}"),
        (given, "start: (", "1("),
        (given, "start: nothing_here", "nothing_here"),
        (given, "start: " + "(" * 200 + '"a"' + ")" * 200, "nested 200 deep"),
        (given, 'root ::= "a" | missing', "missing"),
        (given, "start: <no_such_token>", "no_such_token"),
        (given, 'start: %json {"enum": [-9223372036854775808]}', "beyond ±2^53"),
        (given, 'start: "a" %json{"items": {"type": "integer", "multipleOf": 99999999}}', "multipleOf 99999999"),
        (given, 'start: %lark {\n start: %json {"multipleOf": 99999999}\n}', "multipleOf 99999999"),
        (given, 'root ::= "a"\nx ::= %json {"multipleOf": 99999999}', "cannot be read"),
        (given, 'start: %json {"type": ', "what follows %json is no schema"),
        (given, "start: <[%json]>", "<[%json]>"),
        (given, ' \n{"grammars": [{"json_schema": {"multipleOf": 99999999}}]}', "begins with '{'"),
        (choice, [], "at least one text"),
        (choice, ["a", ""], "at least one character"),
        (choice, ["a" * 1000] * 200, "the choice has"),
        (json_schema, {"type": "string", "enum": ["x" * (MOST_CHARS + 1)]}, f"at most {MOST_CHARS}"),
        (json_schema, {"properties": {f"p{i}": {} for i in range(3000)}}, "more than 2500 schemas"),
        (json_schema, "text", "a schema is an object"),
        (json_schema, False, "a schema is an object"),
        (json_schema, {"type": "animal"}, "animal"),
        (json_schema, {"$ref": "#"}, "nothing can match it: what its $ref names leads to itself, and never ends"),
        (
            json_schema,
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
            "never ends",
        ),
        (json_schema, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "it never ends, or allows too much"),
        (json_schema, {"allOf": [{"$ref": "#"}, {"type": "object"}]}, "circular references"),
        (given, 'start: %json {"$ref": "#"}', "$ref names leads to itself"),
        (regex, r"[^\s\S]", "nothing can match it"),
        (regex, r"a[^\s\S]", "nothing can match it"),
        (given, "root ::= root", "nothing can match it"),
        (given, "start: a\na: b\nb: a", "nothing can match it"),
        (given, 'root ::= "a" root', "it never ends, or allows too much"),
        (json_schema, {"type": "integer", "minimum": 10**40}, "cannot be read"),
        (json_schema, {"enum": [1, {"a": [-(2**63)]}]}, "beyond ±2^53"),
        (json_schema, {"const": -(2**63) + 1}, "beyond ±2^53"),
        (json_schema, {"type": "integer", "multipleOf": 2**31}, "multipleOf 2147483648"),
        (json_schema, {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967)]}, "multipleOf 9967"),
        (json_schema, {"type": "number", "multipleOf": 1234567.891}, "multipleOf 1234567.891"),
        (json_schema, {"type": "string", "pattern": "("}, "regex"),
        (json_schema, {"type": "string", "format": "no-such-format"}, "no-such-format"),
        (json_schema, {"$ref": "http://example.com/other.json"}, "example.com"),
        (json_schema, {"$ref": "#/$defs/nowhere"}, "nowhere"),
        (json_schema, {"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
        (json_schema, {"type": "array", "uniqueItems": True}, "uniqueItems"),
        (json_schema, {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'anyOf' is"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(make, value, says):
    with pytest.raises(GrammarError) as refused:
        tiny_vocabulary().check(make(value))
    assert says in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_schemas_in_a_grammar_are_as_elsewhere():
    """With annotations, on more than one line, and with `%json` in them."""
    schema = {"title": "%json", "type": "object", "properties": {"%json é": {"enum": ["%json {", 1]}}}
    schema |= {"required": ["%json é"], "additionalProperties": False}
    written = given(f'start: NAME %json\n{json.dumps(schema, indent=1)} rest\nNAME: /[a-z]+/\nrest: %json {{}} | "!"\n')
    tiny_vocabulary().check(written)
    assert accepts(written, 'abc{"%json é":"%json {"}!') and accepts(written, 'abc{"%json é": 1}null')
    assert not accepts(written, 'abc{"%json é":"%json"}!')


def test_the_text_of_percent_json_may_stand_in_strings_expressions_and_comments():
    written = given('// a %json {\nstart: "%json" /[!-%json]/ "\\\\%json"i # %json {"multipleOf": 99999999}\n')
    tiny_vocabulary().check(written)
    assert "%json" not in written
    assert all(accepts(written, f"%json{one}\\%JSON") for one in "!#%json") and not accepts(written, "%jsona\\%json")


def test_deep_schemas_are_refused_before_they_cost_anything():
    deep: object = {"type": "string"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarError, match="nested deeper"):
        json_schema(deep)


@pytest.mark.parametrize("part", ['\\"', "\\/", '\\\\\\"', "<a", "\\<a>"], ids=repr)
@pytest.mark.parametrize("head", ["start: ", 'start: "', "start: /"])
def test_a_grammar_of_escapes_is_gone_through_in_linear_time(head, part):
    text = head + part * (60_000 // len(part))
    begun = time.process_time()
    with contextlib.suppress(GrammarError):
        given(text)
    assert time.process_time() - begun < 1  # by the square it is several seconds


def test_an_escape_outside_of_strings_ends_none():
    assert given('start: \\" </think> "<think>"').startswith('start: \\" <[')


def test_a_literal_has_control_tokens_in_it():
    tokens = {name: id_ for name in (CALLS, CALL, SEP) if (id_ := tiny_tokenizer().token_id(name)) is not None}
    assert literal('say "a"', {}) == '"say \\"a\\""' and literal("", tokens) == '""'
    assert (
        literal(f"{CALLS}{CALL}name{SEP}", tokens) == f'<[{tokens[CALLS]}]> <[{tokens[CALL]}]> "name" <[{tokens[SEP]}]>'
    )
    written = f"start: {literal(f'{CALLS}{CALL}name{SEP}', tokens)} rest\nrest: %json {json.dumps(OBJECT)}\n"
    tiny_vocabulary().check(written)
    assert accepts(written, f'{CALLS}{CALL}name{SEP}{{"a":1}}')
    assert not accepts(written, f'{CALLS}name{SEP}{{"a":1}}')


def test_control_tokens_may_be_named_in_a_grammar():
    written = given(f'start: {CALLS} /[a-z]+/ "<think>" </think> <[3]>? // <think>\n')
    tiny_vocabulary().check(written)
    assert written.count("<think>") == 2, "in a string and in a comment it is text"
    spelt = [id_ for char in "<think>" for id_ in tiny_tokenizer().encode(char, add_special_tokens=False)]
    matcher = tiny_vocabulary().compiled(written).copy()
    begin, end = (tiny_tokenizer().encode(text, add_special_tokens=False) for text in (f"{CALLS}abc", "</think>"))
    assert matcher.consume_tokens([*begin, *spelt, *end]) and matcher.is_accepting()
