"""Who is let in, and when one that was refused should come again."""

from __future__ import annotations

import pytest

from isotherm.cluster.api.admission import LONGEST_RETRY, Admission
from isotherm.cluster.engine.places import Band, Claim, Room

ANYBODY = Claim()


def entered(admission: Admission, count: int, capacity: int, now: float, claim: Claim = ANYBODY) -> bool:
    return admission.enter(claim, count, Room(capacity), now) is None


def test_all_of_a_request_or_nothing_is_let_in():
    admission = Admission(lambda: 0.5)
    assert entered(admission, 3, 4, 0.0) and not entered(admission, 2, 4, 0.0) and entered(admission, 1, 4, 0.0)
    assert admission.open == 4
    admission.leave(ANYBODY, 3, 1.0)
    assert admission.open == 1 and entered(admission, 2, 4, 1.0)


def test_a_capacity_that_shrinks_sends_nobody_away():
    admission = Admission(lambda: 0.5)
    assert entered(admission, 4, 4, 0.0) and not entered(admission, 1, 2, 0.0)
    admission.leave(ANYBODY, 4, 1.0)
    assert (admission.open, entered(admission, 1, 2, 1.0)) == (0, True)


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize(("random", "least", "most"), [(0.0, 8, 13), (1.0, 17, 25)])
def test_the_retry_is_a_quarter_to_a_half_of_a_stay(together, random, least, most):
    """100 are open and one leaves every 0.4 s, or 5 every 2 s: each stays for 40 s."""
    admission, now = Admission(lambda: random), 100.0
    entered(admission, 100, 100, now)
    for _ in range(300 // together):
        now += 0.4 * together
        admission.leave(ANYBODY, together, now)
        assert entered(admission, together, 100, now)
    assert least <= admission.retry_after(now) <= most


def test_the_first_departures_of_a_burst_say_little_of_a_stay():
    admission, now = Admission(lambda: 1.0), 0.0
    entered(admission, 256, 256, now)
    assert admission.retry_after(now) == 1, "nothing is known yet"
    assert admission.retry_after(4.0) <= 4
    admission.leave(ANYBODY, 100, 4.0)
    assert admission.retry_after(4.0) <= 4


def test_the_retry_is_at_least_a_second_and_bounded():
    admission = Admission(lambda: 1.0)
    entered(admission, 1000, 1000, 0.0)
    admission.leave(ANYBODY, 1, 60.0)
    assert admission.retry_after(60.0) == LONGEST_RETRY
    idle = Admission(lambda: 1.0)
    entered(idle, 1, 1, 0.0)
    idle.leave(ANYBODY, 1, 0.001)
    entered(idle, 1, 1, 5000.0)
    idle.leave(ANYBODY, 1, 5000.001)
    entered(idle, 1, 1, 5000.001)
    assert idle.retry_after(5000.002) == 1, "time without requests is no stay"


def test_one_that_turns_out_to_be_background_work_gives_its_place_to_others():
    admission, background = Admission(lambda: 0.5), Claim(band=Band.BACKGROUND)
    assert entered(admission, 2, 2, 0.0) and not entered(admission, 1, 2, 0.0)
    admission.move(ANYBODY, background, 2)
    assert entered(admission, 1, 2, 0.0) and not entered(admission, 1, 2, 0.0, background)
    admission.leave(background, 2, 1.0)
    assert admission.open == 1


def test_tokens_that_are_expected_keep_others_out_until_they_leave():
    admission, room = Admission(lambda: 0.5), Room(100, tokens=50)
    assert admission.enter(ANYBODY, 1, room, 0.0) is None
    admission.expect(ANYBODY, 60)
    assert "60 tokens, and 50 fit" in (admission.enter(ANYBODY, 1, room, 0.0) or "")
    admission.leave(ANYBODY, 1, 1.0, 60)
    assert admission.enter(ANYBODY, 1, room, 1.0) is None
