from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isotherm.cluster.text.output import OutputFields, joined
from isotherm.cluster.text.output_parsers import make_parser
from isotherm.cluster.text.think_parser import HiddenThought

OPENED = "<User>why?<Assistant><think>\n"
TEXT = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "<thi", "</", "think>", ">", "/", " ", "\n", "a", "日"]), max_size=9
).map("".join)


def expected(text: str, opened: bool) -> OutputFields:
    """The definition, over the whole text at once."""
    if match := re.match(r"\s*<think>", text):
        text = text[match.end() :]
    elif not opened:
        return OutputFields(text)
    thought, _, content = text.partition("</think>")
    return OutputFields(content, thought)


def parse(pieces, prompt=""):
    parser = make_parser("think", prompt)
    return joined([*(parser.feed(piece) for piece in pieces), parser.finish()])


@given(TEXT, st.lists(st.integers(0, 60), max_size=8), st.booleans())
@example("<think>a</think>b", [3, 10, 12], False)
@example("a</think>\n\nb", [2, 9], True)
@example("<thi", [2], True)
@example(" \n", [1], False)
def test_however_the_text_is_cut_the_fields_are_the_same(text, cuts, opened):
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(ends)]
    prompt = OPENED if opened else ""
    assert parse(pieces, prompt) == parse(list(text), prompt) == parse([text], prompt) == expected(text, opened)


@given(TEXT.filter(lambda text: not text.lstrip().startswith("<think>")))
def test_without_a_tag_at_the_beginning_all_is_content(text):
    assert parse(list(text)) == OutputFields(text)


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("<Assistant><think>", OutputFields("", "7")),
        ("<Assistant><think>\n", OutputFields("", "7")),
        ("<Assistant></think>", OutputFields("7")),  # V3.1 with thinking off
        ("<User>what is <think>?<Assistant>", OutputFields("7")),
        ("", OutputFields("7")),
    ],
)
def test_the_prompts_end_says_where_the_output_begins(prompt, fields):
    assert parse(["7"], prompt) == fields


def test_nothing_is_held_that_cannot_become_a_tag():
    parser = make_parser("think")
    assert parser.feed("He") == OutputFields("He") and not parser.is_reasoning
    assert parser.feed("<thi") == OutputFields("<thi")
    parser = make_parser("think", OPENED)
    assert parser.is_reasoning
    assert parser.feed("so a < b") == OutputFields(reasoning="so a < b")
    assert parser.feed("</th").is_empty
    assert parser.feed("e") == OutputFields(reasoning="</the")
    assert parser.feed(" end</think>7") == OutputFields("7", " end") and not parser.is_reasoning


def test_tags_are_those_that_would_mean_something():
    parser = make_parser("think")
    seen = [set(parser.tags)]
    for text in ("<think>", "hm", "</think>", "<think>"):
        parser.feed(text)
        seen.append(set(parser.tags))
    assert seen == [{"<think>"}, {"</think>"}, {"</think>"}, set(), set()]
    assert set(make_parser("think", OPENED).tags) == {"<think>", "</think>"}


@given(TEXT, st.booleans())
def test_a_hidden_thought_leaves_the_rest_as_it_is(text, opened):
    parser, plain = HiddenThought(make_parser("think", OPENED if opened else "")), make_parser("think", OPENED * opened)
    for char in text:
        fields = parser.feed(char)
        assert fields == OutputFields(plain.feed(char).content)
        assert (parser.is_reasoning, parser.tags) == (plain.is_reasoning, plain.tags)
    assert parser.finish() == OutputFields(plain.finish().content)
