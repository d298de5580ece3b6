"""How much background work steps carry: by what machines do that are modelled here."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from isotherm.cluster.engine.yielding import GROWTH, STRETCH, Yielding

Cost = Callable[[int], float]  # seconds that so many background tokens add to a step


def play(added: Cost, wanted: int = 32, noise: float = 0.0) -> tuple[float, ...]:
    """How much longer the steps are for background work, its tokens a step, and the longest step."""
    steps, alone = 4000, 1e-3
    yielding, rng = Yielding(), random.Random(7)
    seconds, tokens, longest = 0.0, 0, 0.0
    for step in range(steps):
        background = yielding.allowance(1, wanted)
        assert 0 <= background <= wanted
        taken = alone + (added(background) if background else 0.0)
        taken *= 1 + noise * rng.expovariate(1.0)
        yielding.took(1, background, taken)
        if step >= steps // 4:
            seconds, tokens, longest = seconds + taken, tokens + background, max(longest, taken)
    counted = steps - steps // 4
    return seconds / (counted * alone), tokens / counted, longest / alone


def test_work_that_costs_next_to_nothing_is_in_nearly_every_step():
    growth, tokens, _ = play(lambda n: 1e-6 * n)
    assert growth < 1.05 and tokens > 0.9 * 32


@pytest.mark.parametrize("per_token", [2e-5, 1e-4, 1e-3])
def test_work_that_costs_much_is_bounded_and_not_starved(per_token):
    growth, tokens, longest = play(lambda n: per_token * n)
    assert growth <= 1 + 1.1 * GROWTH
    assert tokens * per_token == pytest.approx(GROWTH * 1e-3, rel=0.2), "it has what it may have"
    assert longest <= 1 + 1.5 * STRETCH


@pytest.mark.parametrize("per_token", [2.5e-3, 6e-3])
def test_what_costs_more_than_it_may_save_up_for_is_not_starved(per_token):
    growth, tokens, longest = play(lambda n: per_token * n, wanted=1)
    assert growth <= 1 + 1.1 * GROWTH
    assert tokens * per_token == pytest.approx(GROWTH * 1e-3, rel=0.2), "it has what it may have"
    assert longest <= 1 + 1.5 * per_token / 1e-3


def test_rows_are_computed_together_where_the_first_costs_most():
    growth, tokens, _ = play(lambda n: 8e-4 + 2e-5 * n)
    assert growth <= 1 + 1.1 * GROWTH and tokens > 20 * GROWTH


def test_a_long_prompt_is_computed_in_pieces():
    growth, tokens, longest = play(lambda n: 1e-4 * n, wanted=512)
    assert growth <= 1 + 1.1 * GROWTH and tokens == pytest.approx(GROWTH * 10, rel=0.2)
    assert longest <= 1 + 1.5 * STRETCH


def test_a_machine_that_is_busy_with_other_things_changes_little():
    growth, tokens, _ = play(lambda n: 1e-4 * n, noise=0.3)
    assert growth <= 1.3 * (1 + 2 * GROWTH) and tokens > 0.5


def test_one_slow_step_is_soon_forgiven():
    yielding = Yielding()
    for _ in range(100):
        yielding.took(1, yielding.allowance(1, 4), 1e-3)
    yielding.took(1, 4, 10.0)
    waited = 0
    while not yielding.allowance(1, 4):
        yielding.took(1, 0, 1e-3)
        waited += 1
    assert 20 < waited < 200


def test_nothing_is_allowed_beside_a_size_that_was_not_measured_alone():
    yielding = Yielding()
    assert yielding.allowance(1, 4) == 0
    for _ in range(50):
        yielding.took(1, 0, 1e-3)
    assert yielding.allowance(1, 4) == 4 and yielding.allowance(64, 4) == 0
