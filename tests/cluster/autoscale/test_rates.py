"""Rates made of what workers report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from isotherm.cluster.autoscale.rates import Meters
from isotherm.cluster.messages.meters import DecayedMean, GroupMeter, ShardMeter

NOTHING = np.zeros((1, 2), dtype=np.int64)
SHARD = ShardMeter(3, 1, 128, 0.25, 0, 0, None, 0.0, {}, NOTHING, NOTHING)
GROUP = GroupMeter(0, 0, 0, 0.0, 0.0, 5, 500)


def test_an_older_value_counts_half_after_a_half_life():
    mean = DecayedMean(10.0)
    assert mean.value(0.0) is None
    mean.add(4.0, 0.0)
    mean.add(1.0, 10.0)
    assert mean.value(10.0) == pytest.approx((4 * 0.5 + 1) / 1.5)


def test_a_mean_is_forgotten():
    mean = DecayedMean(10.0)
    mean.add(4.0, 0.0)
    assert mean.value(30.0) == 4.0 and mean.value(60.0) is None


def test_a_mean_of_many_values_is_forgotten_as_soon():
    """A time to first token stood for minutes after the last request, and an idle cluster scaled up."""
    mean = DecayedMean(10.0, lasting=3)
    for _ in range(100):
        mean.add(8.0, 0.0)
    assert mean.value(29.0) == 8.0 and mean.value(31.0) is None


def test_rates_of_a_group():
    meters = Meters(10.0, 30.0)
    for second in range(60):
        report = GroupMeter(2 * second, second, 40 * second, 0.5 * second, 0.1 * second, 7, 700)
        waits = {"expert-0": 0.2 * second}
        meters.observe(
            {s: replace(SHARD, group_wait=waits) for s in ("attention-0", "attention-1")},
            {"expert-0": report},
            float(second),
        )
    (load,) = meters.groups({"expert-0": "node"}, ["attention-0", "attention-1"])
    assert (load.name, load.node, load.experts, load.weight_bytes) == ("expert-0", "node", 7, 700)
    assert [load.busy, load.held, load.waited, load.rows_per_second, load.batch] == pytest.approx(
        [0.5, 0.1, 0.4, 40, 40]
    )
    (load,) = meters.groups({"expert-0": "node"}, ["attention-0"])
    assert load.waited == pytest.approx(0.2)


def test_the_latest_seconds_count_most():
    meters = Meters(10.0, 100.0)
    counts = [min(second, 20) for second in range(61)]
    for second, count in enumerate(counts):
        meters.observe({}, {"expert-0": replace(GROUP, busy_seconds=float(count))}, float(second))
    (load,) = meters.groups({"expert-0": ""}, [])
    assert 0.03 < load.busy < 0.07  # four half-lives, and the first seconds are not at full weight yet


def test_a_shard_waits_for_its_first_tokens():
    meters = Meters(10.0, 30.0)
    meters.observe({"attention-0": replace(SHARD, first_token_seconds=0.5, longest_wait=2.0)}, {}, 0.0)
    meters.observe(
        {"attention-0": replace(SHARD, tokens=30, steps=10, first_token_seconds=0.5, longest_wait=0.1)}, {}, 2.0
    )
    (load,) = meters.shards({"attention-0": ""})
    assert (load.running, load.waiting, load.kv_used, load.first_token_seconds) == (3, 1, 0.25, 0.5)
    assert (load.tokens_per_second, load.steps_per_second) == (15, 5)


def test_a_count_that_falls_began_anew():
    meters = Meters(10.0, 30.0)
    for second, busy in ((0.0, 100.0), (1.0, 0.5), (2.0, 1.0)):
        meters.observe({}, {"expert-0": replace(GROUP, busy_seconds=busy)}, second)
    (load,) = meters.groups({"expert-0": ""}, [])
    assert 0 < load.busy < 0.5


def test_who_is_silent_or_gone_drops_out():
    meters = Meters(10.0, 30.0)
    meters.observe({"attention-0": SHARD}, {"expert-0": GROUP, "expert-1": GROUP}, 0.0)
    meters.observe({}, {"expert-0": GROUP}, 31.0)
    assert [g.name for g in meters.groups({"expert-0": "", "expert-1": ""}, [])] == ["expert-0"]
    assert meters.shards({"attention-0": ""}) == []
    assert meters.groups({"expert-2": ""}, []) == []


def test_groups_that_are_gone_are_forgotten():
    meters = Meters(10.0, 30.0)
    for second in range(200):
        meters.observe(
            {"attention-0": replace(SHARD, group_wait={f"expert-{second}": 1.0})},
            {f"expert-{second}": GROUP},
            float(second),
        )
    (track,) = meters._shards.values()
    assert len(track._rates) <= 3 and len(meters._groups) <= 31


def test_a_shards_own_figures_are_those_that_it_reported_last():
    meters = Meters(10.0, silence=5.0)
    meters.observe({"attention-0": replace(SHARD, figures=("old",))}, {}, 0.0)
    meters.observe({"attention-0": replace(SHARD, figures=("new",))}, {}, 1.0)
    assert meters.figures(["attention-0", "attention-1"]) == {"attention-0": ("new",)}
