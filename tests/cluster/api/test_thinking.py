"""What a chat asks of its thought, by templates that turn it on and off, always do, or never."""

from __future__ import annotations

import json
from functools import cache

import pytest
from chat_templates import TEMPLATES, write_chat_tokenizer

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.prepare import PromptLimits, Served
from isotherm.cluster.api.prepare_chat import prepare_chat
from isotherm.cluster.text.output import OutputFields, joined
from isotherm.cluster.text.tokenizer import Tokenizer

LIMITS = PromptLimits(max_model_len=400, vocab_size=1000, max_prompt_chars=5000)
USER = [{"role": "user", "content": "hi"}]
BY_EFFORT = "{{ messages[0].content }}|{{ reasoning_effort | default('unsaid') }}|"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    sources = {**TEMPLATES, "by effort": BY_EFFORT}

    @cache
    def load(name):
        return Served({"m"}, Tokenizer.load(write_chat_tokenizer(tmp_path_factory.mktemp("t"), sources[name])), LIMITS)

    yield load
    for name in sources:
        load(name).tokenizer.chat_template.close()


def prepared(served, **body):
    return prepare_chat(json.dumps({"model": "m", "messages": USER, **body}).encode(), "id", served)


def prompt(served, **body):
    return served.tokenizer.decode(prepared(served, **body).requests[0].prompt, skip_special_tokens=False)


ON = [
    {"thinking": True},
    {"enable_thinking": True},
    {"thinking": {"type": "enabled"}},
    {"thinking": {"type": "enabled", "budget_tokens": 50}},
    {"thinking": {"type": "adaptive"}},
    {"reasoning_effort": "minimal"},
    {"reasoning_effort": "high", "enable_thinking": True},
    {"reasoning": {"effort": "low"}},
    {"reasoning": {"enabled": True, "max_tokens": 9}},
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": {"enable_thinking": True}},
]
OFF = [
    {"thinking": False},
    {"enable_thinking": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"max_thinking_tokens": 0},
    {"thinking_budget": 0},
    {"chat_template_kwargs": {"thinking": False}},
    {"chat_template_kwargs": {"enable_thinking": False}},
]


@pytest.mark.parametrize("body", ON, ids=str)
def test_thinking_on(served, body):
    assert prompt(served("V3.1"), **body).endswith("<｜Assistant｜><think>")
    assert prompt(served("GLM"), **body).endswith("<|assistant|>")
    assert prompt(served("R1"), **body).endswith("<think>\n")  # it always does
    assert prompt(served("R1-0528"), **body).endswith("<｜Assistant｜>")  # the model opens it


@pytest.mark.parametrize("body", OFF, ids=str)
def test_thinking_off(served, body):
    assert prompt(served("V3.1"), **body).endswith("<｜Assistant｜></think>")
    assert prompt(served("GLM"), **body).endswith("<think></think>")
    assert prompt(served("Hermes"), **body).endswith("assistant\n")  # it never does
    for name in ("V3.1", "GLM", "Hermes"):
        assert prepared(served(name), **body).requests[0].params.max_thinking_tokens is None


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("Hermes", {"thinking": {"type": "enabled"}}, "thinking"),
        ("Hermes", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("V3.1", {"thinking": True, "enable_thinking": False}, "enable_thinking"),
        ("V3.1", {"reasoning_effort": "none", "thinking": {"type": "enabled"}}, "thinking"),
        ("V3.1", {"reasoning": {"effort": "low", "enabled": False}}, "reasoning.enabled"),
        ("V3.1", {"max_thinking_tokens": 5, "thinking_budget": 6}, "thinking_budget"),
        ("V3.1", {"max_thinking_tokens": -1}, "max_thinking_tokens"),
        ("V3.1", {"reasoning_effort": "loud"}, "reasoning_effort"),
        ("V3.1", {"thinking": {"type": "perhaps"}}, "thinking.type"),
        ("V3.1", {"thinking": "yes"}, "thinking"),
        ("V3.1", {"include_reasoning": False, "separate_reasoning": False}, "separate_reasoning"),
    ],
)
def test_what_cannot_be_or_contradicts_itself_is_refused_by_name(served, name, body, param):
    with pytest.raises(ReplyError) as info:
        prepared(served(name), **body)
    assert (info.value.status, info.value.param) == (400, param)


@pytest.mark.parametrize(
    "body", [{"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}, "reasoning_effort": "high"}]
)
def test_a_thought_that_is_only_offered_needs_none(served, body):
    """As Claude Code offers it to every model."""
    assert prompt(served("Hermes"), **body).endswith("assistant\n")
    assert prompt(served("V3.1"), **body).endswith("<｜Assistant｜><think>")


def test_a_template_may_read_the_effort_itself(served):
    assert prompt(served("by effort")) == "hi|unsaid|"
    assert prompt(served("by effort"), reasoning_effort="xhigh") == "hi|xhigh|"
    assert prompt(served("by effort"), reasoning={"effort": "none"}) == "hi|none|"
    assert (
        prompt(served("by effort"), reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "own"})
        == "hi|own|"
    )


def test_the_templates_own_arguments_have_the_last_word(served):
    body = {"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}
    assert prompt(served("V3.1"), **body).endswith("</think>")


CASES = [
    ("R1", {}, "so</think>\n\n7", OutputFields("\n\n7", "so")),
    ("R1", {}, "so", OutputFields("", "so")),  # cut short in its thought
    ("R1", {}, "</think>7", OutputFields("7", "")),
    ("R1", {}, "\n\n</think>\n\n7", OutputFields("\n\n7", "\n\n")),
    ("R1-0528", {}, "<think>\nso\n</think>\n\n7", OutputFields("\n\n7", "\nso\n")),
    ("R1-0528", {"thinking": True}, "<think>\nso", OutputFields("", "\nso")),
    ("R1-0528", {"include_reasoning": False}, "<think>\nso</think>7", OutputFields("7")),
    ("V3.1", {"thinking": True}, "so</think>7", OutputFields("7", "so")),
    ("V3.1", {}, "7", OutputFields("7")),
    ("GLM", {}, "\n<think>so</think>\n7", OutputFields("\n7", "so")),
    ("GLM", {}, "\n<think></think>\n7", OutputFields("\n7", "")),
    ("GLM", {"enable_thinking": False}, "\n7", OutputFields("\n7")),
    ("Kimi", {}, "<think>so</think>7", OutputFields("7", "so")),
    ("Kimi", {}, "<think>so", OutputFields("", "so")),
    ("R1", {"include_reasoning": False}, "so</think>7", OutputFields("7")),
    ("V3.1", {"thinking": True, "separate_reasoning": False}, "so</think>7", OutputFields("so</think>7")),
]


@pytest.mark.parametrize(("name", "body", "text", "fields"), CASES)
def test_the_thought_is_split_as_the_family_writes_it(served, name, body, text, fields):
    for pieces in ([text], list(text)):
        parser = prepared(served(name), **body).new_parser(0)
        assert joined([*map(parser.feed, pieces), parser.finish()]) == fields


def test_a_thought_that_was_begun_goes_on(served):
    thought = [*USER, {"role": "assistant", "content": "Because", "prefix": True}]
    made = prepared(served("V3.1"), messages=thought, thinking=True)
    parser = made.new_parser(0)
    assert joined([parser.feed(" so</think>7"), parser.finish()]) == OutputFields("7", " so")
    made = prepared(served("V3.1"), messages=thought)
    parser = made.new_parser(0)
    assert joined([parser.feed(" so"), parser.finish()]) == OutputFields(" so")


LIMITED = [
    {"max_thinking_tokens": 7},
    {"thinking_budget": 7},
    {"thinking": {"type": "enabled", "budget_tokens": 7}},
    {"reasoning": {"max_tokens": 7}},
]


@pytest.mark.parametrize("body", LIMITED, ids=str)
def test_a_thought_may_have_a_limit(served, body):
    def limit(name, **more):
        params = prepared(served(name), n=2, **body, **more).requests[1].params
        begin, end = (served(name).tokenizer.decode(ids) for ids in (params.thought_begin, params.thought_end))
        assert len(params.thought_end) == 1
        return params.max_thinking_tokens, begin, end

    assert limit("R1") == (7, "", "</think>")  # the prompt begins it
    assert limit("R1-0528") == (7, "<think>", "</think>")  # the model does
    assert limit("V3.1", enable_thinking=True) == (7, "", "</think>")
    assert limit("GLM") == (7, "<think>", "</think>")
    assert prepared(served("GLM")).requests[0].params.max_thinking_tokens is None


@pytest.mark.parametrize("body", [body for body in OFF if "chat_template_kwargs" not in body], ids=str)
def test_without_a_switch_a_thought_ends_before_it_begins(served, body):
    for name, begin in (("R1", ""), ("R1-0528", "<think>"), ("Kimi", "<think>")):
        params = prepared(served(name), **body).requests[0].params
        assert params.max_thinking_tokens == 0 and len(params.thought_end) == 1
        assert served(name).tokenizer.decode(params.thought_begin) == begin
