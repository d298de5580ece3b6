"""What a key may still take, by a clock that stands still until it is moved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.api.access.allowance import Allowance, Bucket, Refusal, duration, share
from isotherm.cluster.api.access.caller import KeyLimits


def test_requests_come_back_evenly():
    allowance = Allowance(KeyLimits(requests_per_minute=6))
    assert [allowance.request(100.0) for _ in range(6)] == [None] * 6
    assert allowance.request(100.0) == Refusal("requests_per_minute", pytest.approx(10))
    assert allowance.request(109.0) == Refusal("requests_per_minute", pytest.approx(1))
    assert allowance.request(110.0) is None and allowance.request(110.0) is not None
    assert [allowance.request(1000.0) for _ in range(7)].count(None) == 6  # never more than a minute's


def test_tokens_of_outputs_may_leave_a_debt():
    allowance = Allowance(KeyLimits(tokens_per_minute=60))
    assert allowance.request(0.0) is None and allowance.generation(40, 1, 0.0) is None
    allowance.used(50, 0.0)  # 30 more than there were
    assert allowance.request(0.0) == Refusal("tokens_per_minute", pytest.approx(31))
    assert allowance.headers(0.0)["x-ratelimit-remaining-tokens"] == "0"
    assert allowance.request(31.0) is None
    assert allowance.generation(10, 1, 31.0) == Refusal("tokens_per_minute", pytest.approx(9))
    assert allowance.generation(10, 1, 40.0) is None


def test_a_prompt_that_is_longer_than_a_minute_waits_for_a_full_one():
    allowance = Allowance(KeyLimits(tokens_per_minute=60))
    assert allowance.generation(1000, 1, 0.0) is None
    assert allowance.generation(1000, 1, 60.0) == Refusal("tokens_per_minute", pytest.approx(940))


def test_streams_are_counted_until_they_end():
    allowance = Allowance(KeyLimits(streams=3))
    assert allowance.generation(9, 2, 0.0) is None
    assert allowance.generation(9, 2, 0.0) == Refusal("streams", 1.0)
    assert allowance.generation(9, 1, 0.0) is None and allowance.streams == 3
    allowance.ended(2)
    assert allowance.generation(9, 2, 0.0) is None
    allowance.ended(3)
    assert allowance.streams == 0


def test_what_is_refused_costs_nothing():
    allowance = Allowance(KeyLimits(streams=1, tokens_per_minute=60, requests_per_minute=60))
    assert allowance.generation(10, 1, 0.0) is None
    assert allowance.generation(10, 1, 0.0) is not None
    assert allowance.headers(0.0)["x-ratelimit-remaining-tokens"] == "50" and allowance.streams == 1


def test_headers_are_openais():
    allowance = Allowance(KeyLimits(requests_per_minute=60, tokens_per_minute=6000))
    allowance.request(5.0)
    allowance.generation(1000, 1, 5.0)
    assert allowance.headers(5.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5000",
        "x-ratelimit-reset-tokens": "10s",
    }
    assert Allowance(KeyLimits(streams=2)).headers(0.0) == {}
    assert [duration(s) for s in (0, 0.0121, 1.25, 59.99, 61.5, 360)] == [
        "0ms",
        "13ms",
        "1.3s",
        "1m0s",
        "1m1.5s",
        "6m0s",
    ]


def test_other_limits_from_now_on():
    """As the file says after a change; what was taken stays taken."""
    allowance = Allowance(KeyLimits(requests_per_minute=10, streams=1))
    for _ in range(8):
        allowance.request(0.0)
    allowance.generation(0, 1, 0.0)
    allowance.change(KeyLimits(requests_per_minute=20, streams=2))
    assert allowance.headers(0.0)["x-ratelimit-remaining-requests"] == "12"
    assert allowance.generation(0, 1, 0.0) is None
    allowance.change(KeyLimits())
    assert allowance.request(0.0) is None and not allowance.counts


def test_replicas_share_limits_out():
    limits = KeyLimits(requests_per_minute=100, tokens_per_minute=None, streams=3, n=4, max_tokens=50)
    assert share(limits, 1) == limits
    assert share(limits, 2) == KeyLimits(requests_per_minute=50, streams=2, n=4, max_tokens=50)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 300)), min_size=1, max_size=60),
)
def test_over_any_time_no_more_than_the_rate_and_one_minute(per_minute: int, asked: list[tuple[float, int]]):
    bucket, now, taken = Bucket(per_minute), 0.0, 0
    for pause, amount in asked:
        now += pause
        amount = min(amount, per_minute)
        if not bucket.wait(amount, now):
            bucket.take(amount, now)
            taken += amount
    assert taken <= per_minute * (1 + now / 60) + 1e-3
