"""Log-probabilities in replies: a prompt's in both forms, and where in a text its tokens begin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from fake_engine import BOS, EOS
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.api.logprobs import PromptScores, TextOffsets, completion_entries, joined_entries
from isotherm.cluster.messages.requests import PromptLogprobs, TokenLogprobs


def scores_of(prompt):
    return tuple(TokenLogprobs(-float(i), ((7, -0.5), (prompt[i], -float(i))), rank=2) for i in range(1, len(prompt)))


@given(st.text(max_size=20), st.integers(0, 50))
def test_a_token_begins_where_its_first_character_does(text, cut):
    """Tokens of single bytes: those in the middle of a character begin where it is."""
    data = text.encode()
    offsets = TextOffsets(cut)
    found = [offsets.take(data[i : i + 1]) for i in range(len(data))]
    assert found == [cut + i for i, char in enumerate(text) for _ in char.encode()]


def test_echoed_entries_are_openais(tokenizer):
    prompt = tokenizer.encode("hello world")  # a BOS comes first, which is not in the text
    scores = PromptScores(prompt, tokenizer, echo="hello world", echo_top=1)
    assert scores.report() is None
    scores.take(PromptLogprobs(1, scores_of(prompt)))
    entries = scores.report().entries
    assert {len(values) for values in entries.values()} == {len(prompt)}
    assert entries["tokens"] == [BOS, *(tokenizer.decode([id_]) for id_ in prompt[1:])]
    assert entries["token_logprobs"] == [None, *(-float(i) for i in range(1, len(prompt)))]
    likeliest = {tokenizer.decode([7]): -0.5}
    own = [{token: -float(i)} for i, token in enumerate(entries["tokens"]) if i]  # they are among them in any case
    assert entries["top_logprobs"] == [None, *(one | likeliest for one in own)]
    assert entries["text_offset"][:2] == [0, 0]
    for token, at in list(zip(entries["tokens"], entries["text_offset"], strict=True))[1:]:
        assert "hello world"[at:].startswith(token)


def test_the_token_that_was_drawn_is_among_the_likeliest_in_any_case(tokenizer):
    """OpenAI: there may be one more than were asked for. Of two with one text the likelier counts."""
    first, second, third = tokenizer.encode("hello world, lazy dog", add_special_tokens=False)[:3]
    told = TokenLogprobs(-3.0, ((first, -0.5), (second, -1.0)))
    names = [tokenizer.decode([id_]) for id_ in (first, second, third)]
    (beyond,) = completion_entries(tokenizer, [(third, told, 0)])["top_logprobs"]
    assert list(beyond.items()) == [(names[0], -0.5), (names[1], -1.0), (names[2], -3.0)]
    (among,) = completion_entries(tokenizer, [(second, replace(told, chosen=-1.0), 0)])["top_logprobs"]
    assert among == {names[0]: -0.5, names[1]: -1.0}
    assert completion_entries(tokenizer, [(third, TokenLogprobs(-3.0), 0)])["top_logprobs"] == [{names[2]: -3.0}]
    beside = completion_entries(tokenizer, [(third, TokenLogprobs(-3.0, ((third, -0.5),)), 0)])["top_logprobs"]
    assert beside == [{names[2]: -0.5}]


@pytest.mark.parametrize("skip", [True, False])
def test_offsets_are_those_of_the_text_that_is_shown(tokenizer, skip):
    prompt = tokenizer.encode(f"{BOS}naïve {EOS}日本 😀", add_special_tokens=False)
    echo = tokenizer.decode(prompt, skip)
    scores = PromptScores(prompt, tokenizer, echo=echo)
    scores.take(PromptLogprobs(1, scores_of(prompt)))
    entries = scores.report().entries
    for i, at in enumerate(entries["text_offset"]):
        assert len(tokenizer.decode(prompt[:i], skip).rstrip("\ufffd")) == at


def test_scores_come_in_parts_and_again(tokenizer):
    prompt = tokenizer.encode("hello world, lazy dog")
    whole, parts = PromptScores(prompt, tokenizer, top=2), PromptScores(prompt, tokenizer, top=2)
    scores = scores_of(prompt)
    whole.take(PromptLogprobs(1, scores))
    parts.take(PromptLogprobs(1, scores[:3]))
    assert parts.report() is None
    parts.take(PromptLogprobs(2, scores[1:]))
    assert parts.report() == whole.report()
    with pytest.raises(RuntimeError, match="prompt token 5 is scored before 1"):
        PromptScores(prompt, tokenizer, top=0).take(PromptLogprobs(5, scores[4:]))


def test_prompt_logprobs_are_vllms(tokenizer):
    prompt = [5, 9, 7]
    scores = PromptScores(prompt, tokenizer, top=2)
    scores.take(
        PromptLogprobs(
            1, (TokenLogprobs(-3.0, ((7, -0.5), (8, -math.inf)), rank=4), TokenLogprobs(-0.5, ((7, -0.5),), 1))
        )
    )
    report = scores.report()
    assert report.entries is None and report.by_token == (
        None,
        {
            "9": {"logprob": -3.0, "rank": 4, "decoded_token": tokenizer.decode([9])},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode([7])},
            "8": {"logprob": -9999.0, "rank": 2, "decoded_token": tokenizer.decode([8])},
        },
        {"7": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode([7])}},
    )


def test_a_prompt_of_one_token_has_a_report_at_once(tokenizer):
    assert PromptScores([5], tokenizer, top=1).report().by_token == (None,)


def test_entries_of_either_form_join():
    assert joined_entries([]) is joined_entries([None, None]) is None
    chat = {"content": [1], "refusal": None}
    assert joined_entries([chat, None, {"content": [2], "refusal": None}]) == {"content": [1, 2], "refusal": None}
    assert joined_entries([None, chat]) == chat
