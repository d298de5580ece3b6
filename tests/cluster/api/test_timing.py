from __future__ import annotations

import pytest

from isotherm.cluster.api.timing import HEADER, Stopwatch


class Clock:
    now = 10.0

    def __call__(self):
        return self.now


def test_the_phases_follow_each_other_and_add_up():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 0.5
    watch.submitted()
    clock.now += 2.0
    assert not watch.has_first
    watch.first(queued=1.5)
    clock.now += 4.0
    assert watch.has_first and watch.phases() == pytest.approx(
        {"prepare": 0.5, "queue": 1.5, "prefill": 0.5, "decode": 4.0, "total": 6.5}
    )
    assert watch.header() == {
        HEADER: "prepare;dur=500.0, queue;dur=1500.0, prefill;dur=500.0, decode;dur=4000.0, total;dur=6500.0"
    }
    assert watch.as_json()["total_ms"] == 6500.0


def test_a_wait_that_another_clock_has_measured_takes_no_more_than_there_was():
    clock = Clock()
    watch = Stopwatch(clock)
    watch.submitted()
    clock.now += 1.0
    watch.first(queued=1.2)
    assert watch.phases() == {"prepare": 0.0, "queue": 1.0, "prefill": 0.0, "decode": 0.0, "total": 1.0}
