"""What a request's client side is told of the shards that it has been at."""

from __future__ import annotations

from isotherm.cluster.messages.requests import Course, Delta, FinishReason, GenerationRequest, SamplingParams
from isotherm.cluster.routing.journey import Journey

REQUEST = GenerationRequest("r", (1, 2), SamplingParams(10))


def test_a_request_that_stays_is_told_nothing():
    journey = Journey(REQUEST)
    delta = Delta("r", 0, (5,))
    assert journey.take(delta) and journey.told(delta) is delta


def test_moves_and_losses_are_told_apart_and_with_what_the_shard_says():
    journey = Journey(REQUEST)
    for reason in FinishReason.MOVED, FinishReason.LOST, FinishReason.MOVED:
        assert not journey.take(Delta("r", 0, finish_reason=reason))
    told = journey.told(Delta("r", 0, (5,), course=Course(((0.5, 2),), preemptions=1)))
    assert told.course == Course(((0.5, 2),), preemptions=1, moved=2, resumed=1)
    assert journey.told(Delta("r", 1, (6,))).course == Course(moved=2, resumed=1)
