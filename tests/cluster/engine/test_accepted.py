"""Which of the tokens after drafts hold."""

from __future__ import annotations

from dataclasses import replace

from isotherm.cluster.engine.sequence import Chunk, Form, Sampled, ScheduledSequence, accepted, verified
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams


def chunk(*draft: int) -> Chunk:
    sequence = ScheduledSequence(GenerationRequest("a", (1, 2), SamplingParams(9)), 0, [1, 2])
    return Chunk(sequence, 1, 1 + len(draft), Form.DECODE, sample=True, draft=draft)


def test_each_right_guess_gives_one_more():
    results = [Sampled(5), Sampled(6), Sampled(7)]
    assert accepted(chunk(5, 6), results) == results
    assert accepted(chunk(5, 9), results) == results[:2]
    assert accepted(chunk(9, 6), results) == results[:1]


def test_what_comes_after_an_error_does_not_hold_whatever_was_guessed():
    results = [Sampled(5), Sampled(-1, error="no number"), Sampled(7)]
    assert accepted(chunk(5, -1), results) == results[:2]


def test_what_comes_after_the_end_does_not_count_and_was_not_guessed_wrong():
    ending = chunk(5, 6, 7)
    ending.sequence.request = replace(ending.sequence.request, params=SamplingParams(9, stop_token_ids=(6,)))
    results = [Sampled(5), Sampled(6), Sampled(7), Sampled(8)]
    assert verified(ending, results) == results[:2] and ending.sequence.verified == (2, 2)
    other = chunk(5, 9, 7)
    assert verified(other, results) == results[:2] and other.sequence.verified == (2, 1)
