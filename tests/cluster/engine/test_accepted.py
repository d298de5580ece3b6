"""Which of the tokens after drafts hold."""

from __future__ import annotations

from isotherm.cluster.engine.sequence import Chunk, Form, Sampled, ScheduledSequence, accepted
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
