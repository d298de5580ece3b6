"""What of a body is refused before its fields are looked at, and what that may cost."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.messages import MessagesBody
from isotherm.cluster.api.bodies.responses import ResponsesBody
from isotherm.cluster.api.bodies.tokenization import DetokenizeBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import json_object, parse_body

BEGUN = '{"role": "assistant", "content": "x", "prefix": true}'


def refused(call):
    """The error, and the bytes that finding it took at most."""
    tracemalloc.start()
    try:
        with pytest.raises(ReplyError) as error:
            call()
        return error.value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (r'{"a": "\ud83d"}', "a"),
        (r'{"a": [{"b": "fine"}, {"b": [1, "\ud83d"]}]}', "a[1].b[1]"),
        (r'{"a": {"\ud83d": 1}}', "a"),
        (r'{"\ud83d": 1}', None),
        ('{"a": NaN}', "a"),
        ('{"a": [{"b": 1.5}, {"b": [1, -Infinity]}]}', "a[1].b[1]"),
        ('{"tools": [{"parameters": {"default": 1e400}}]}', "tools[0].parameters.default"),
    ],
)
def test_what_has_no_form_in_a_reply_is_refused_where_it_stands(body, param):
    with pytest.raises(ReplyError) as error:
        json_object(body.encode())
    assert error.value.status == 400 and error.value.param == param
    assert str(error.value).startswith(f"{param or ''}: ")


def test_constants_are_spelt_as_in_json():
    body = {"model": "m", "prompt": "x", "stream": True, "stream_options": {"include_obfuscation": True}}
    with pytest.raises(ReplyError) as error:
        parse_body(CompletionBody, json.dumps(body).encode())
    assert str(error.value) == "stream_options.include_obfuscation: input should be false, got true"


def test_pairs_of_surrogates_and_finite_numbers_are_taken():
    assert json_object(rb'{"a": ["\ud83d\ude00", 1e308, -0.0, 1e-400, 12]}') == {"a": ["😀", 1e308, -0.0, 0.0, 12]}


@pytest.mark.parametrize("last", [r'"\ud83d"', "1e999"])
def test_looking_through_a_deep_body_takes_memory_by_its_size(last):
    depth = 800
    deep = '["", "", "", "", "", "", "", "", ' * depth + '"x"' + "]" * depth
    before, after = (f'{{"b": {{"c": {last}}}, "a": {deep}}}', f'{{"a": {deep}, "b": {{"c": {last}}}}}')
    for text in (before, after):
        error, most = refused(lambda text=text: json_object(text.encode()))
        assert error.param == "b.c" and most < 100 * len(text)


MANY = [0] * 50_000
MESSAGE = {"role": "user", "content": "hi"}
CHAT = {"model": "m", "messages": [MESSAGE]}
RESPONSE = {"model": "m", "input": "hi"}


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ChatBody, {**CHAT, "messages": MANY}, "messages[0]"),
        (ChatBody, {**CHAT, "messages": [MESSAGE, {"role": "user", "content": MANY}]}, "messages[1].content[0]"),
        (ChatBody, {**CHAT, "messages": [{**MESSAGE, "tool_calls": MANY}]}, "messages[0].tool_calls[0]"),
        (ChatBody, {**CHAT, "tools": MANY[:500]}, "tools[0]"),
        (ChatBody, {**CHAT, "documents": MANY}, "documents[0]"),
        (ChatBody, {**CHAT, "guided_choice": MANY[:4000]}, "guided_choice[0]"),
        (CompletionBody, {"model": "m", "prompt": ["a", *MANY[:100]]}, "prompt[1]"),
        (CompletionBody, {"model": "m", "prompt": [1, *[-1] * 50_000]}, "prompt[1]"),
        (CompletionBody, {"model": "m", "prompt": [[1], [-1] * 50_000]}, "prompt[1][0]"),
        (DetokenizeBody, {"tokens": [-1] * 50_000}, "tokens[0]"),
        (ResponsesBody, {**RESPONSE, "input": MANY}, "input[0]"),
        (ResponsesBody, {**RESPONSE, "tools": MANY}, "tools[0]"),
        (ResponsesBody, {**RESPONSE, "include": MANY}, "include[0]"),
        (MessagesBody, {**CHAT, "max_tokens": 1, "messages": MANY}, "messages[0]"),
        (MessagesBody, {**CHAT, "max_tokens": 1, "system": MANY}, "system[0]"),
        (MessagesBody, {**CHAT, "max_tokens": 1, "tools": MANY}, "tools[0]"),
        (MessagesBody, {**CHAT, "max_tokens": 1, "stop_sequences": MANY}, "stop_sequences[0]"),
    ],
)
def test_only_the_first_wrong_element_of_a_list_costs_anything(model, body, param):
    raw = json.dumps(body).encode()
    error, most = refused(lambda: parse_body(model, raw))
    assert error.status == 400 and error.param == param
    assert most < 100_000 + 40 * len(raw)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"messages": ["hi"]}', 'messages[0]: input should be an object, got "hi"'),
        ('{"messages": []}', "messages: list should have at least 1 item, not 0, got an array of 0"),
        ('{"messages": [{"role": "assistant"}]}', "messages[0].content: a message of role assistant needs content: "),
        (f'{{"seed": {"9" * 5000}}}', "the body has an integer of too many digits"),
        (f'{{"messages": [{BEGUN}, {BEGUN}]}}', "messages[0].prefix: only the last message can go on"),
        (f'{{"messages": [{BEGUN}], "logit_bias": {{"x": 1}}}}', 'logit_bias.x: the key "x" should match pattern '),
        (f'{{"messages": [{BEGUN}], "logit_bias": {{"7": 101}}}}', "logit_bias.7: input should be less than or equal"),
        (
            f'{{"messages": [{BEGUN}], "logit_bias": {{"[key]": "x"}}}}',
            'logit_bias.[key]: the key "[key]" should match',
        ),
    ],
)
def test_messages_are_for_people_who_know_json_and_not_python(body, words):
    with pytest.raises(ReplyError) as caught:
        parse_body(ChatBody, body.replace("{", '{"model": "m", ', 1).encode())
    assert str(caught.value).startswith(words)


def test_a_long_key_is_named_by_how_it_begins():
    """Where a client's own names stand, one may have any length."""
    body = {"model": "m", "input": "x", "metadata": {"k" * 10_000: "v"}}
    with pytest.raises(ReplyError) as caught:
        parse_body(ResponsesBody, json.dumps(body).encode())
    assert len(caught.value.message) < 300 and caught.value.param == "metadata." + "k" * 100
