from __future__ import annotations

import pytest

from isotherm.cluster.engine.ngram import NgramDrafter
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams


def sequence(tokens: list[int]) -> ScheduledSequence:
    return ScheduledSequence(GenerationRequest("a", tuple(tokens), SamplingParams(99)), 0, list(tokens))


def guess(one: ScheduledSequence, most: int) -> list[int]:
    drafter = NgramDrafter()
    room = drafter.most(one, most)
    return drafter.draft([(one, room)])[0] if room else []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),
        ([1, 2, 3, 7, 1, 2, 3, 8, 9, 1, 2, 3], [8, 9, 1, 2]),  # what came last
        ([5, 5, 5, 5], [5, 5, 5, 5]),  # what repeats itself goes on
        ([9, 1, 2, 1, 2, 1], [2, 1, 2, 1]),
        ([1, 2, 3, 4], []),
        ([1, 2], []),
        ([1, 2, 3], []),
    ],
)
def test_what_followed_is_guessed(tokens: list[int], expected: list[int]):
    assert guess(sequence(tokens), 4) == expected


def test_an_index_grows_with_its_sequence():
    one = sequence([1, 2, 3])
    for token in (4, 5, 1, 2, 3):
        assert guess(one, 4) == []
        one.tokens.append(token)
    assert guess(one, 2) == [4, 5]
