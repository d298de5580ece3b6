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


@pytest.mark.parametrize(("random", "wanted"), [(0.0, 10), (1.0, 20)])
def test_the_retry_is_a_quarter_to_a_half_of_a_stay(random, wanted):
    """100 are open and one leaves every 0.4 s, so each stays for 40 s."""
    admission, now = Admission(lambda: random), 100.0
    admission.enter(100, 100, now)
    for _ in range(300):
        now += 0.4
        admission.leave(1, now)
        assert admission.enter(1, 100, now)
    assert admission.retry_after() == wanted


def test_the_retry_is_at_least_a_second_and_bounded():
    admission = Admission(lambda: 1.0)
    admission.enter(1000, 1000, 0.0)
    assert admission.retry_after() == 1, "nothing is known yet"
    admission.leave(1, 60.0)
    assert admission.retry_after() == LONGEST_RETRY
    idle = Admission(lambda: 1.0)
    idle.enter(1, 1, 0.0)
    idle.leave(1, 0.001)
    idle.enter(1, 1, 5000.0)
    idle.leave(1, 5000.001)
    idle.enter(1, 1, 5000.001)
    assert idle.retry_after() == 1, "time without requests is no stay"
