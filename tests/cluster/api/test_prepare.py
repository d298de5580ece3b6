from __future__ import annotations

import json

import pytest
from fake_engine import BOS, write_tokenizer

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.other_names import OTHER_NAMES
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import PromptLimits, Served, choice_seed
from isotherm.cluster.api.prepare_chat import prepare_chat
from isotherm.cluster.api.prepare_completion import prepare_completion
from isotherm.cluster.engine.places import QueueFullError, Room, ShardPlaces
from isotherm.cluster.text.tokenizer import Tokenizer

LIMITS = PromptLimits(max_model_len=64, vocab_size=1000, max_prompt_chars=500)
USER = [{"role": "user", "content": "hi"}]


def raw(**fields):
    return json.dumps({"model": "m", **fields}).encode()


def chat(tokenizer, **fields):
    return prepare_chat(raw(**{"messages": USER, **fields}), "id", Served({"m"}, tokenizer, LIMITS))


def complete(tokenizer, **fields):
    return prepare_completion(raw(**{"prompt": "hi", **fields}), "id", Served({"m"}, tokenizer, LIMITS))


def test_chat_defaults(tokenizer):
    prepared = chat(tokenizer)
    (request,) = prepared.requests
    assert tokenizer.decode(request.prompt, skip_special_tokens=False).endswith("<User>hi<Assistant>")
    assert request.prompt.count(0) == 1
    assert request.params.max_tokens == 64 - len(request.prompt) == 64 - prepared.prompt_tokens
    assert (request.params.temperature, request.params.top_p, request.params.top_k, request.params.logprobs) == (
        1.0,
        1.0,
        0,
        None,
    )
    assert request.params.stop_token_ids == (1,)
    assert 0 <= request.params.seed < 2**63 and request.params.seed != chat(tokenizer).requests[0].params.seed


def test_chat_parameters_arrive(tokenizer):
    prepared = chat(
        tokenizer,
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        seed=7,
        stop="x",
        stop_token_ids=[9, 3],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        n=3,
        user="me",
        metadata={},
        some_new_field=1,
        chat_template_kwargs={"thinking": True},
    )
    assert prepared.body.stops == ("x",)
    params = [request.params for request in prepared.requests]
    assert (params[0].max_tokens, params[0].temperature, params[0].top_p, params[0].top_k, params[0].logprobs) == (
        5,
        0.0,
        0.5,
        -1,
        2,
    )
    assert params[0].stop_token_ids == (3, 9)
    assert (
        [one.seed for one in params] == [choice_seed(7, i) for i in range(3)]
        and params[0].seed == 7
        and len({one.seed for one in params}) == 3
    )
    assert tokenizer.decode(prepared.requests[0].prompt).endswith("<think>")
    assert prepared.prompt_tokens == len(prepared.requests[0].prompt)
    assert len({request.id for request in prepared.requests}) == 3


def test_a_prompt_that_its_template_makes_too_long_is_refused_before_it_is_tokenised(tokenizer, monkeypatch):
    def encode(*_, **__):
        raise AssertionError("tokenised")

    monkeypatch.setattr(tokenizer, "encode", encode)
    monkeypatch.setattr(tokenizer, "_control_tokens", None)
    messages = [{"role": "user", "content": "x" * 40}] * 12
    with pytest.raises(ReplyError, match="characters are more than the 500 that a prompt may have") as info:
        chat(tokenizer, messages=messages)
    assert (info.value.param, info.value.code) == ("messages", "context_length_exceeded")


def test_messages_for_the_template():
    body = parse_body(
        ChatBody,
        raw(
            messages=[
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": "7", "tool_call_id": "1", "weight": 1},
                {"role": "assistant", "content": "a", "reasoning": "hm", "reasoning_content": "hm"},
                {"role": "assistant", "content": None, "reasoning": "hm"},
            ]
        ),
    )
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
    ]


def test_what_asks_for_no_call_is_taken():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in (
        {"tools": tools, "tool_choice": "none"},
        {"tools": tools, "tool_choice": "none", "parallel_tool_calls": False},
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"functions": [], "function_call": "none"},
    ):
        parse_body(ChatBody, raw(messages=USER, **fields))


def test_completion_prompts(tokenizer):
    ids = tokenizer.encode("hi")
    assert ids[0] == 0
    assert complete(tokenizer).requests[0].prompt == tuple(ids)
    assert complete(tokenizer).requests[0].params.max_tokens == 16
    assert [one.prompt for one in complete(tokenizer, prompt=["hi", "ho"]).requests] == [
        tuple(ids),
        tuple(tokenizer.encode("ho")),
    ]
    assert complete(tokenizer, prompt=[4, 5]).requests[0].prompt == (4, 5)
    several = complete(tokenizer, prompt=[[4], [5, 6]], n=2, seed=-2)
    assert [one.prompt for one in several.requests] == [(4,), (4,), (5, 6), (5, 6)]
    assert several.prompt_tokens == 3
    assert several.requests[0].params.seed == several.requests[2].params.seed == 2**63 - 2
    assert len({complete(tokenizer, seed=-1).requests[0].params.seed for _ in range(3)}) == 3
    assert complete(tokenizer, prompt=ids, echo=True).echo == ("hi",)
    assert complete(tokenizer, prompt=["x"] * 3, best_of=1, logprobs=0).requests[2].params.logprobs == 0
    long = complete(tokenizer, prompt=[4] * 60)
    assert long.requests[0].params.max_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"bad_words": ["a", ""]}, "bad_words[1]"),
        ({"bad_words": "a"}, "bad_words"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"reasoning_effort": "loud"}, "reasoning_effort"),
        ({"presence_penalty": True}, "presence_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty"),  # 0 in float32: a forbidden token's logit is no number
        ({"min_p": 1.1}, "min_p"),
        ({"speculation": "mtp"}, "speculation"),
        ({"priority": 1.5}, "priority"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": {"5000": 1}}, "logit_bias[5000]"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}, 5]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": "x" * 501}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),  # the template refuses it
        ({"tools": [1]}, "tools[0]"),
        ({"stop_token_ids": [5000]}, "stop_token_ids[0]"),
    ],
)
def test_chat_errors_name_the_field(tokenizer, fields, param):
    with pytest.raises(ReplyError) as info:
        chat(tokenizer, **fields)
    assert (info.value.status, info.value.param) == (400, param)
    assert param.rsplit(".", 1)[-1] in info.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [4, "a"]}, "prompt[1]"),
        ({"prompt": [[4], []]}, "prompt[1]"),
        ({"prompt": [[4], [5000]]}, "prompt[1][0]"),
        ({"prompt": [4, 5000]}, "prompt[1]"),
        ({"prompt": ["a", "b" * 501]}, "prompt[1]"),
        ({"prompt": ["a"] * 50, "n": 3}, "n"),
        ({"prompt": {}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 50, "best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_completion_errors_name_the_field(tokenizer, fields, param):
    with pytest.raises(ReplyError) as info:
        complete(tokenizer, **fields)
    assert (info.value.status, info.value.param) == (400, param)


def test_a_bodys_user_has_no_share_and_is_called_no_key(tokenizer):
    """Two clients, or one under two names: each place is anybody's until there is none."""
    places = ShardPlaces(Room(8))
    made = [chat(tokenizer, user=f"user {i % 2}").requests[0] for i in range(9)]
    for request in made[:8]:
        places.enter(request)
    with pytest.raises(QueueFullError) as refused:
        places.enter(made[8])
    assert str(refused.value) == "at this shard 8 requests are running or waiting, and 8 may"


def test_what_a_body_says_of_sampling_goes_to_the_engine(tokenizer):
    asked = {"min_p": 0.1, "presence_penalty": -2, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "top_k": 4}
    (request,) = chat(tokenizer, **asked, priority=-3, user="me").requests
    assert {name: getattr(request.params, name) for name in asked} == asked
    assert (request.priority, request.key) == (-3, ""), "a body's user is no key"
    (request,) = chat(tokenizer, logit_bias={"7": -100, "3": 1, "03": 1.5}, min_tokens=2).requests
    assert (request.params.logit_bias, request.params.min_tokens) == (((3, 1.5), (7, -100.0)), 2)
    assert chat(tokenizer, speculation="auto").requests[0].params.speculate
    assert not chat(tokenizer, speculation="off").requests[0].params.speculate
    chat(tokenizer, chat_template_kwargs={"template_kwargs": 1, "tokenizer": 2})  # any other name is the template's
    (request,) = complete(tokenizer).requests
    assert (request.params.min_p, request.params.repetition_penalty, request.priority) == (0, 1, 0)


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_other_servers_call_otherwise_is_refused_by_name(tokenizer, ask, name):
    neutral, instead = OTHER_NAMES[name]
    for value in neutral:
        ask(tokenizer, **{name: value})
    ask(tokenizer, **{name: None})
    with pytest.raises(ReplyError) as info:
        ask(tokenizer, **{name: 0.37})
    assert (info.value.status, info.value.param) == (400, name)
    assert info.value.message.startswith(f"{name} is not supported here; ")
    assert not instead or f"use {instead}" in info.value.message


def test_what_is_told_to_be_used_instead_is_there():
    assert {instead for _, instead in OTHER_NAMES.values() if instead} <= set(CompletionBody.model_fields)
    assert not OTHER_NAMES.keys() & (CompletionBody.model_fields.keys() | ChatBody.model_fields.keys())


def test_bad_words_have_their_tokens_with_a_space_before_them_and_without(tokenizer):
    (request,) = complete(tokenizer, bad_words=["lazy dog", " fox", "日本"]).requests
    for text in ("lazy dog", " lazy dog", "fox", " fox", "日本", " 日本"):
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) in request.params.bad_words
    assert all(request.params.bad_words) and len(set(request.params.bad_words)) == len(request.params.bad_words)
    assert complete(tokenizer, bad_words=[]).requests[0].params.bad_words == ()
    # White space alone is a word too.
    assert (
        tuple(tokenizer.encode("  ", add_special_tokens=False))
        in chat(tokenizer, bad_words=["  "]).requests[0].params.bad_words
    )


def test_a_family_is_the_choices_of_one_prompt(tokenizer):
    requests = complete(tokenizer, prompt=["hi", "ho"], n=2, best_of=3).requests
    assert len(requests) == 6 and len({request.family for request in requests}) == 2
    assert [request.family == requests[0].family for request in requests] == [True] * 3 + [False] * 3
    assert all(request.params.logprobs == 0 for request in requests)  # by which the best are chosen
    assert [request.family for request in complete(tokenizer, prompt=["hi", "ho"]).requests] == ["", ""]
    assert len(chat(tokenizer, n=128).requests) == 128


def test_scores_of_a_prompt_are_asked_of_its_first_choice(tokenizer):
    def asked(**fields):
        return [request.params.prompt_logprobs for request in complete(tokenizer, **fields).requests]

    assert asked(prompt_logprobs=2, n=2, prompt=["hi", "ho"]) == [2, None, 2, None]
    assert asked(echo=True, logprobs=3) == [3] and asked(echo=True) == asked(logprobs=3) == [None]
    assert asked(echo=True, logprobs=1, prompt_logprobs=4) == [4]
    assert asked(echo=True, logprobs=1, n=2, stream=True) == [1, 1]  # none waits for another
    assert asked(prompt_logprobs=False) == [None] and asked(prompt_logprobs=0) == [0]
    (request,) = chat(tokenizer, prompt_logprobs=1).requests
    assert request.params.prompt_logprobs == 1


def test_a_prompt_alone_may_fill_the_context(tokenizer):
    (request,) = complete(tokenizer, prompt=[4] * 64, max_tokens=0, echo=True, logprobs=0).requests
    assert request.params.max_tokens == 0
    with pytest.raises(ReplyError) as info:
        complete(tokenizer, prompt=[4] * 65, max_tokens=0, echo=True)
    assert info.value.code == "context_length_exceeded"


def test_special_tokens_before_a_completions_prompt(tokenizer):
    ids = tokenizer.encode("hi")
    assert complete(tokenizer, prompt=f"{BOS}hi").requests[0].prompt == tuple(ids)
    assert complete(tokenizer, add_special_tokens=False).requests[0].prompt == tuple(ids[1:])
    chat(tokenizer, add_special_tokens=False)


def test_what_a_body_does_not_say_is_the_checkpoints(tokenizer):
    defaults = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05, "max_tokens": 3}

    def params(**fields):
        body = raw(prompt="hi", **fields)
        return prepare_completion(body, "id", Served({"m"}, tokenizer, LIMITS, defaults)).requests[0].params

    found = params()
    assert {name: getattr(found, name) for name in defaults} == defaults
    found = params(temperature=0, top_p=1, min_p=0, max_tokens=5)
    assert (found.temperature, found.top_p, found.min_p, found.max_tokens) == (0, 1, 0, 5)


def test_neutral_values_pass(tokenizer):
    chat(
        tokenizer,
        logit_bias={},
        response_format={"type": "text"},
        presence_penalty=0.0,
        n=None,
        tool_choice="auto",
        parallel_tool_calls=True,
        audio=None,
    )
    complete(tokenizer, suffix="", frequency_penalty=0, stop=[])


def test_context_length_names_the_numbers(tokenizer):
    for fields, numbers in (
        ({"prompt": [4] * 64}, ("64", "at least 1")),
        ({"prompt": [4] * 10, "max_tokens": 55}, ("64", "10", "55")),
    ):
        with pytest.raises(ReplyError) as info:
            complete(tokenizer, **fields)
        assert info.value.code == "context_length_exceeded"
        assert all(number in info.value.message for number in numbers)


def test_bodies_that_are_not_json():
    cases = [
        b"{",
        b"[]",
        b"\xff",
        b"5",
        b'{"a": ' + b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "prompt": "\\ud800"}',
    ]
    for body in cases:
        with pytest.raises(ReplyError) as info:
            parse_body(CompletionBody, body)
        assert info.value.status == 400
    assert info.value.param == "prompt"
    assert parse_body(CompletionBody, b'{"model": "m", "prompt": "\\ud83d\\ude00"}').prompt == "\U0001f600"


def test_broken_template_is_the_servers_fault(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template="{% if %}"))
    with pytest.raises(ReplyError) as info:
        chat(tokenizer)
    tokenizer.chat_template.close()
    assert info.value.status == 500 and info.value.headers["x-should-retry"] == "false"


def test_a_template_that_refuses_any_message_is_the_servers_fault(tmp_path):
    """As one does that adds a token to a text, where the file is missing that names the token."""
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token + messages[0].content }}")
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(
        ReplyError, match=r"even a plain message: .*; it wants bos_token, which tokenizer_config"
    ) as info:
        chat(tokenizer)
    tokenizer.chat_template.close()
    assert info.value.status == 500 and info.value.param is None
    assert info.value.headers["x-should-retry"] == "false"


def test_a_template_that_refuses_these_messages_is_not(tmp_path):
    source = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=source))
    with pytest.raises(ReplyError, match="one at a time") as info:
        chat(tokenizer, messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    tokenizer.chat_template.close()
    assert info.value.status == 400 and info.value.param == "messages"
