"""Signs of life come from the thread that works, not from the event loop beside it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from isotherm.actors import pulse as pulse_module
from isotherm.actors.pulse import ALLOWED, Lately, Pulse


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(pulse_module, "LOOK", 0.002)


def is_felt(pulse: Pulse, seconds: float = 0.1) -> bool:
    async def go() -> bool:
        try:
            await asyncio.wait_for(pulse.felt(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    return asyncio.run(go())


def test_a_thread_that_rests_is_prodded():
    prodded = threading.Event()
    pulse = Pulse(prodded.set)

    def work() -> None:
        prodded.wait(5)
        pulse.begin()

    threading.Thread(target=work).start()
    assert is_felt(pulse, 5)


def test_a_thread_that_stands_still_is_not_felt():
    pulse = Pulse()
    pulse.beat()
    time.sleep(0.02)
    assert not is_felt(pulse)


def test_a_piece_of_work_may_take_a_few_times_as_long_as_the_longest():
    pulse = Pulse()
    pulse.begin()
    time.sleep(0.1)
    pulse.beat()
    assert is_felt(pulse)  # hardly begun
    time.sleep(0.1 * (ALLOWED - 2))
    assert is_felt(pulse)
    time.sleep(0.4)
    assert not is_felt(pulse)


def test_the_first_piece_may_take_what_compiling_takes():
    pulse = Pulse(least=0.5)
    pulse.begin()
    assert is_felt(pulse)


def test_the_rest_before_it_is_no_piece_of_work():
    pulse = Pulse()
    time.sleep(0.2)
    pulse.begin()
    pulse.beat()
    time.sleep(0.05)
    assert not is_felt(pulse)


def test_waiting_for_another_is_not_felt_and_says_for_whom_and_for_how_long():
    pulse = Pulse(least=10)
    pulse.wait("expert-0")
    time.sleep(0.1)
    whom, seconds = pulse.waited()
    assert whom == "expert-0" and seconds >= 0.1 and not is_felt(pulse)
    pulse.go_on()
    assert pulse.waited() == ("", 0.0) and is_felt(pulse)


def test_one_pause_is_no_measure_of_work():
    """A process that was stopped for six seconds once may not hang for six seconds the next time, and be called well;
    nor for four times as many."""
    lately = Lately()
    for _ in range(20):
        lately.add(0.002)
    lately.add(6.0)
    assert lately.longest <= 0.002
    lately.add(0.003)
    assert 0.002 < lately.longest <= 0.003
    lately.add(6.0)
    assert lately.longest > 5.9, "what takes so long twice takes so long"
    for _ in range(10_000):
        lately.add(0.002)
    assert lately.longest < 0.003, "that was long ago"


def test_what_takes_no_longer_than_lately_goes_on():
    pulse = Pulse()
    pulse.begin()
    time.sleep(0.1)
    pulse.beat()
    time.sleep(0.03)
    assert pulse.as_lately()
    pulse.wait("expert-0")
    time.sleep(0.03)
    assert not pulse.as_lately(), "nobody has been waited for before"
    pulse.answered()
    pulse.go_on()
    pulse.wait("expert-0")
    assert pulse.as_lately()
    time.sleep(0.1)
    assert not pulse.as_lately()
    pulse.go_on()  # without an answer: that is nothing to go by
    pulse.wait("expert-0")
    time.sleep(0.05)
    assert not pulse.as_lately()


def test_waits_that_were_measured_elsewhere_are_something_to_go_by():
    """Else the first wait that is long would be taken for what waits are like."""
    pulse = Pulse()
    for seconds in (0.001, 6.0):
        pulse.answered(seconds)
    pulse.wait("expert-0")
    time.sleep(0.01)
    assert not pulse.as_lately()


def test_who_lacks_what_was_lost_is_well_and_does_not_go_on():
    pulse = Pulse()
    pulse.worked(5.0)
    pulse.answered(5.0)
    for go_on in (pulse.beat, pulse.begin, pulse.go_on, lambda: pulse.wait("expert-0")):
        pulse.stand()
        assert not pulse.as_lately()
        go_on()
        assert pulse.as_lately()
