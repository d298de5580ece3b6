"""Whether a peer or the checkpoint is taken, by what is known of both."""

from __future__ import annotations

import math

import pytest

from isotherm.actors.experts.copy_choice import LEAST_LIMIT, MOST_LIMIT, REMEMBERED, Rates, choose, limit


@pytest.mark.parametrize(
    "wish, peer, checkpoint, from_peer",
    [
        ("auto", None, None, True),  # bytes that need no packing are tried first
        ("auto", None, 0.001, True),
        ("auto", 0.002, None, False),  # then the other, so that there is something to compare
        ("auto", 0.002, 0.003, True),
        ("auto", 0.003, 0.002, False),
        ("auto", 0.002, 0.002, False),  # the same: nobody is troubled
        ("auto", math.inf, 9.0, False),  # it has failed
        ("auto", math.inf, None, False),
        ("peer", math.inf, 0.001, True),
        ("checkpoint", 0.001, 9.0, False),
    ],
)
def test_choice(wish, peer, checkpoint, from_peer: bool):
    choice = choose(wish, peer, checkpoint)
    assert choice.from_peer is from_peer and choice.why


def test_the_reason_has_both_figures():
    assert choose("auto", 0.0012, 0.0065).why == "1.20 ms an expert from it, 6.50 ms from the checkpoint"
    assert choose("auto", math.inf, 0.0065).why == "it has failed lately"


def test_rates_are_of_one_expert_and_are_forgotten():
    rates = Rates()
    assert rates.of("expert-1", 0.0) is None
    rates.note("expert-1", 4, 2.0, 10.0)
    assert rates.of("expert-1", 10.0 + REMEMBERED) == 0.5 and rates.of("expert-1", 10.1 + REMEMBERED) is None
    rates.note("expert-1", 0, 1.0, 11.0)
    assert rates.of("expert-1", 12.0) == math.inf
    rates.note("expert-2", 1, 1.0, 12.0 + REMEMBERED)
    assert rates.of("expert-1", 12.0) is None, "names of groups that are gone do not pile up"


def test_a_peer_has_some_times_what_reading_takes():
    assert limit(None) == MOST_LIMIT == limit(100.0)
    assert limit(0.001) == LEAST_LIMIT and limit(1.5) == 6.0
