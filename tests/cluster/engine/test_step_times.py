"""What is expected of steps, by what was told of them."""

from __future__ import annotations

import pytest

from isotherm.cluster.engine.step_times import FORGET_AFTER, SETTLED, Times


def test_times_are_exact_where_measured_and_grow_between_and_beyond():
    times = Times(64, 4)
    assert times.of(3) is None
    times.add(1, 2.5)
    assert times.of(1) is None and not times.knows(1), "what is done first is slow"
    for rows, seconds in ((1, 1.0), (5, 5.0), (5, 2.0)):
        times.add(rows, seconds)
    assert times.of(1) == 1.0 and times.of(5) == 2.0 and times.of(3) == pytest.approx(1.5)
    assert times.of(50) > times.of(20) > 2.0


def test_one_quick_step_of_many_rows_does_not_make_fewer_rows_quick():
    times = Times(64, 4)
    for _ in range(20):
        times.add(2, 1.0)
    for _ in range(2):
        times.add(3, 0.5)  # a disturbed clock
    assert 0.9 < times.of(2) < 1.0 and times.of(3) == pytest.approx(times.of(2))
    for _ in range(20):
        times.add(3, 1.2)
    assert times.of(2) == pytest.approx(1.0) and 1.0 < times.of(3) < 1.2


def test_one_hiccup_is_not_taken_for_a_step():
    times = Times(0, 0)
    for _ in range(10):
        times.add(4, 1.0)
    times.add(4, 1000.0)
    assert times.of(4) < 1.3


def test_what_was_taken_for_a_step_and_was_a_hiccup_is_forgotten():
    times = Times(0, 0)
    times.add(4, 10.0)
    times.add(4, 1.0)
    assert times.of(4) is None and not times.knows(4)
    times.add(4, 1.2)
    assert times.of(4) == pytest.approx(1.1) and times.knows(4)


def test_a_second_time_that_is_quicker_takes_the_place_of_the_first():
    """Code and weights that nothing had touched before: drafts that paid seemed not to, for as long as a mean lasts."""
    times = Times(64, 4)
    times.add(2, 2.5)
    times.add(2, 1.0)
    assert times.of(2) == 1.0 and times.knows(2)
    times.add(2, 1.3)
    assert times.of(2) == pytest.approx(1.1)


def test_what_makes_steps_of_some_rows_slower_makes_all_slower():
    times = Times(64, 4)
    for rows, seconds in ((1, 1.0), (5, 2.0)):
        for _ in range(SETTLED):
            times.add(rows, seconds)
    for _ in range(60):
        times.add(1, 2.0)
    assert times.of(1) == pytest.approx(2.0, rel=0.01) and times.of(5) == pytest.approx(4.0, rel=0.01)
    assert times.add(1, 0.5) == pytest.approx(0.25, rel=0.01), "a machine that is quick again is so at once"
    times.add(1, 0.5)
    assert times.of(5) == pytest.approx(1.0, rel=0.01)


def test_few_measurements_say_nothing_about_others():
    times = Times(64, 4)
    for _ in range(SETTLED):
        times.add(5, 2.0)
    for seconds in (1.0, 1.0, 3.0, 3.0):
        times.add(1, seconds)
    assert times.of(5) == 2.0


@pytest.mark.parametrize("stands_for", [1, 32])
def test_what_was_measured_long_ago_is_forgotten_by_steps_that_were_not_measured_too(stands_for: int):
    times = Times(64, 4)
    for rows, seconds in ((1, 1.0), (5, 9.0)):
        times.add(rows, seconds)
        times.add(rows, seconds)
    for _ in range(FORGET_AFTER // stands_for - 1):
        times.add(1, 1.0, stands_for)
    assert times.of(5) == 9.0
    times.add(1, 1.0, 2 * stands_for)
    guess = times.of(5)
    assert guess is not None and guess < 2.0
