"""Who is let in, and when one that was refused should come again."""

from __future__ import annotations

import pytest

from isotherm.cluster.admission import LONGEST_RETRY, Admission


def test_all_of_a_request_or_nothing_is_let_in():
    admission = Admission(lambda: 0.5)
    assert admission.enter(3, 4, 0.0) and not admission.enter(2, 4, 0.0) and admission.enter(1, 4, 0.0)
    assert admission.open == 4
    admission.leave(3, 1.0)
    assert admission.open == 1 and admission.enter(2, 4, 1.0)


def test_a_capacity_that_shrinks_sends_nobody_away():
    admission = Admission(lambda: 0.5)
    assert admission.enter(4, 4, 0.0) and not admission.enter(1, 2, 0.0)
    admission.leave(4, 1.0)
    assert (admission.open, admission.enter(1, 2, 1.0)) == (0, True)


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize(("random", "least", "most"), [(0.0, 8, 13), (1.0, 17, 25)])
def test_the_retry_is_a_quarter_to_a_half_of_a_stay(together, random, least, most):
    """100 are open and one leaves every 0.4 s, or 5 every 2 s: each stays for 40 s."""
    admission, now = Admission(lambda: random), 100.0
    admission.enter(100, 100, now)
    for _ in range(300 // together):
        now += 0.4 * together
        admission.leave(together, now)
        assert admission.enter(together, 100, now)
    assert least <= admission.retry_after(now) <= most


def test_the_first_departures_of_a_burst_say_little_of_a_stay():
    admission, now = Admission(lambda: 1.0), 0.0
    admission.enter(256, 256, now)
    assert admission.retry_after(now) == 1, "nothing is known yet"
    assert admission.retry_after(4.0) <= 4
    admission.leave(100, 4.0)
    assert admission.retry_after(4.0) <= 4


def test_the_retry_is_at_least_a_second_and_bounded():
    admission = Admission(lambda: 1.0)
    admission.enter(1000, 1000, 0.0)
    admission.leave(1, 60.0)
    assert admission.retry_after(60.0) == LONGEST_RETRY
    idle = Admission(lambda: 1.0)
    idle.enter(1, 1, 0.0)
    idle.leave(1, 0.001)
    idle.enter(1, 1, 5000.0)
    idle.leave(1, 5000.001)
    idle.enter(1, 1, 5000.001)
    assert idle.retry_after(5000.002) == 1, "time without requests is no stay"
