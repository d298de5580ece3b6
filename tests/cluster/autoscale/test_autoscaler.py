"""The autoscaler's decisions: thresholds that must hold, pauses, bounds, and no flapping, also in a simulated closed
loop."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.cluster.autoscale.autoscaler import (
    COPIES,
    GROUPS,
    SHARDS,
    Autoscaler,
    Bounds,
    Decision,
    Limits,
    Observation,
    bounds,
)
from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.manifest import AutoscalingSection, parse_manifest
from isotherm.cluster.placement.policy import Plan, Step
from isotherm.cluster.placement.table import contiguous_placement

PLACEMENT = contiguous_placement([1], 4, ["expert-0", "expert-1"])


def plan(before: float, after: float, steps: int = 1) -> Plan:
    return Plan((Step(1, 0, "expert-0", "expert-1"),) * steps, PLACEMENT, before, after, before, after, "")


def groups(count: int, busy: float = 0.5, weight_bytes: int = 0) -> tuple[GroupLoad, ...]:
    return tuple(GroupLoad(f"expert-{i}", "", busy, 0.0, 0.0, 100.0, 4.0, 10, weight_bytes) for i in range(count))


def shards(
    count: int, running: int = 1, waiting: int = 0, kv: float = 0.6, first: float = 0.1
) -> tuple[ShardLoad, ...]:
    return tuple(ShardLoad(f"attention-{i}", "", running, waiting, 128, kv, first, 10.0, 10.0) for i in range(count))


def seen(
    now: float, g: tuple[GroupLoad, ...] = (), s: tuple[ShardLoad, ...] = (), p: Plan | None = None
) -> Observation:
    return Observation(now, g, s, len(g), len(s), p)


def scaler(most: int = 8, memory: int = 0, **config: Any) -> Autoscaler:
    return Autoscaler(Limits(AutoscalingSection(**config), Bounds(1, most), Bounds(1, most), memory))


def first(autoscaler: Autoscaler, observations: list[Observation]) -> tuple[float, Decision] | None:
    """The first decision, and when."""
    for o in observations:
        if (decision := autoscaler.decide(o)) is not None:
            return o.now, decision
    return None


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "initial", "expected"),
    [
        (None, None, 2, None), (1, None, 2, Bounds(1, 2)), (None, 4, 2, Bounds(2, 4)), (1, 4, 2, Bounds(1, 4)),
        (3, None, 2, Bounds(3, 3)), (None, 1, 2, Bounds(1, 1)),
    ],
)  # fmt: skip
def test_bounds_that_are_not_given_are_the_initial_number(low, high, initial, expected):
    assert bounds(low, high, initial) == expected


def test_by_default_the_number_of_workers_is_left_alone_and_copies_are_not():
    limits = Limits.of(parse_manifest({}))
    assert limits.groups is None and limits.shards is None
    found = first(
        Autoscaler(limits), [seen(t, groups(2, 1.0), shards(1, waiting=50), plan(1.8, 1.0)) for t in range(0, 100, 2)]
    )
    assert found is not None and found[1].kind == COPIES


def test_a_model_without_routed_experts_has_no_groups():
    assert Limits.of(parse_manifest({"autoscaling": {"expert_groups": {"max": 4}}}), moe=False).groups is None


@pytest.mark.parametrize("mode", ["off", False])
def test_off_is_off(mode):
    limits = Limits.of(parse_manifest({"autoscaling": {"mode": mode, "expert_groups": {"max": 9}}}))
    assert (
        first(Autoscaler(limits), [seen(t, groups(1, 1.0), shards(1), plan(2.0, 1.0)) for t in range(0, 1000, 2)])
        is None
    )


# --- copies ---------------------------------------------------------------------------------------


def test_a_rebalance_comes_when_the_imbalance_has_held():
    found = first(scaler(), [seen(t, groups(2), p=plan(1.5, 1.02)) for t in (0.0, 1.0, 2.0, 3.0)])
    assert found is not None and found[0] == 2.0
    decision = found[1]
    assert decision.plan is not None and decision.figures["imbalance"] == 1.5 and decision.figures["loads"] == 1
    assert "1.500" in decision.reason and "1.020" in decision.reason


@pytest.mark.parametrize("p", [plan(1.09, 1.0), plan(1.5, 1.49), plan(1.5, 1.0, steps=0), None])
def test_what_does_not_pay_is_left(p):
    assert first(scaler(), [seen(t, groups(2), p=p) for t in range(0, 60, 2)]) is None


def test_a_reason_that_goes_away_begins_anew():
    times = [seen(t, groups(2), p=plan(1.5 if t % 4 else 1.0, 1.0)) for t in range(0, 60, 1)]
    assert first(scaler(copies={"after": 3.0}), times) is None


def test_copies_pause_after_a_change_and_longer_after_failures():
    autoscaler = scaler()
    _, decision = first(autoscaler, [seen(t, groups(2), p=plan(1.5, 1.0)) for t in range(0, 9, 2)])
    autoscaler.succeeded(decision, 3.0)
    again = first(autoscaler, [seen(t, groups(2), p=plan(1.5, 1.0)) for t in range(4, 60, 1)])
    assert again is not None and again[0] == 9.0
    assert [autoscaler.failed(decision, 100.0) for _ in range(3)] == [12.0, 24.0, 48.0]
    later = first(autoscaler, [seen(t, groups(2), p=plan(1.5, 1.0)) for t in range(100, 200, 1)])
    assert later is not None and later[0] == 148.0
    assert {autoscaler.failed(decision, 100.0) for _ in range(1100)} >= {900.0}  # days of failures: no overflow


# --- groups ---------------------------------------------------------------------------------------


def test_groups_follow_their_utilisation():
    found = first(scaler(), [seen(t, groups(4, 0.95)) for t in range(0, 60, 3)])
    assert found is not None and found[0] == 15 and found[1].kind == GROUPS
    assert (
        found[1].count == math.ceil(4 * 0.95 / 0.6)
        and "95%" in found[1].reason
        and found[1].figures["busy"] == pytest.approx(0.95)
    )


def test_groups_follow_their_memory():
    found = first(scaler(memory=100), [seen(t, groups(2, 0.1, weight_bytes=95)) for t in range(0, 60, 3)])
    assert found is not None and found[1].count == 3 and "95%" in found[1].reason


def test_no_group_goes_whose_experts_would_not_fit_elsewhere():
    idle = [seen(t, groups(2, 0.01, weight_bytes=60)) for t in range(0, 4000, 10)]
    assert first(scaler(memory=100), idle) is None
    found = first(scaler(memory=200), idle)
    assert found is not None and found[0] == 300 and found[1].count == 1


def test_a_group_is_not_taken_away_while_another_is_silent():
    loads = groups(2, 0.01)
    observations = [Observation(t, loads, (), 3, 0) for t in range(0, 4000, 10)]
    assert first(scaler(), observations) is None


def test_fewer_than_the_least_is_made_good_at_once():
    autoscaler = Autoscaler(Limits(AutoscalingSection(), Bounds(3, 4), None))
    found = first(autoscaler, [seen(0.0, groups(1, 0.5))])
    assert found is not None and found[1].count == 3


def test_more_than_the_most_is_the_operators_word():
    autoscaler = Autoscaler(Limits(AutoscalingSection(), Bounds(1, 2), None))
    assert first(autoscaler, [seen(t, groups(4, 0.7)) for t in range(0, 1000, 10)]) is None


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"waiting": 9}, "9.0 requests wait"),
        ({"kv": 0.9}, "90% of the KV blocks"),
        ({"first": 7.0}, "first token takes 7.0 s"),
    ],
)
def test_shards_follow_queue_cache_and_first_token(load: dict[str, Any], words: str):
    found = first(scaler(), [seen(t, s=shards(2, **load)) for t in range(0, 60, 3)])
    assert (
        found is not None
        and found[0] == 15
        and found[1].kind == SHARDS
        and found[1].count > 2
        and words in found[1].reason
    )


@pytest.mark.parametrize("load", [{"waiting": 1}, {"kv": 0.3}, {"first": 3.0}, {"running": 70}])
def test_a_shard_goes_only_when_none_of_them_is_needed(load: dict[str, Any]):
    idle = {"kv": 0.1, "running": 0, "waiting": 0, "first": 0.0}
    assert first(scaler(), [seen(t, s=shards(2, **idle | load)) for t in range(0, 2000, 10)]) is None
    found = first(scaler(), [seen(t, s=shards(2, **idle)) for t in range(0, 2000, 10)])
    assert found is not None and found[0] == 300 and found[1].count == 1


# --- whatever comes -------------------------------------------------------------------------------

LOADS = st.lists(
    st.tuples(st.floats(0.1, 30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 40), st.floats(0, 20),
              st.floats(1, 4), st.sampled_from([None, True, False])),
    min_size=1, max_size=60,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(LOADS, st.integers(1, 3), st.integers(3, 6))
def test_bounds_and_cooldowns_hold_whatever_comes(loads, least, most):
    """Decisions are carried out, or fail, or (None) are still on their way for a while."""
    config = AutoscalingSection(cooldown=20.0, down_after=30.0, up_after=5.0)
    autoscaler = Autoscaler(Limits(config, Bounds(least, most), Bounds(least, most)))
    counts = {GROUPS: least, SHARDS: least}
    now, quiet_until = 0.0, {GROUPS: 0.0, SHARDS: 0.0, COPIES: 0.0}
    for wait, busy, kv, waiting, first_token, imbalance, outcome in loads:
        now += wait
        loads = groups(counts[GROUPS], busy), shards(counts[SHARDS], 1, waiting, kv, first_token)
        decision = autoscaler.decide(seen(now, *loads, plan(imbalance, 1.0)))
        if decision is None:
            continue
        assert now >= quiet_until[decision.kind]
        quiet_until[decision.kind] = now + (6.0 if decision.kind == COPIES else 20.0)
        if decision.kind != COPIES:
            assert least <= decision.count <= most and decision.count != counts[decision.kind]
        if outcome:
            autoscaler.succeeded(decision, now)
            if decision.kind != COPIES:
                counts[decision.kind] = decision.count
        elif outcome is False:
            quiet_until[decision.kind] = now + autoscaler.failed(decision, now)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.floats(0.05, 12), st.integers(1, 16), st.floats(0.0, 0.05))
def test_a_steady_load_finds_a_number_of_groups_and_stays(demand: float, start: int, wobble: float):
    """`demand`: groups' worth of work. Each change is carried out at once."""
    autoscaler = scaler(most=16)
    count, changes = start, []
    for look in range(3600):
        now = 2.0 * look
        busy = min(1.0, demand / count * (1 + wobble * math.sin(look)))
        decision = autoscaler.decide(seen(now, groups(count, busy)))
        if decision is not None:
            changes.append((now, decision.count - count))
            count = decision.count
            autoscaler.succeeded(decision, now)
    ups = [change > 0 for _, change in changes]
    assert sum(a != b for a, b in pairwise(ups)) <= 1, f"it went up and down: {changes}"
    assert not [now for now, _ in changes if now > 5400], changes
    busy = demand / count
    assert busy * (1 - wobble) <= 0.8 or count == 16
    assert count == 1 or busy * (1 + wobble) * count / (count - 1) >= 0.4


def test_a_closed_loop_settles_after_each_change_of_load():
    """Shards with their queues: a request takes a second of a place, a shard has eight. The load goes up, and down
    again."""
    autoscaler = Autoscaler(Limits(AutoscalingSection(down_after=60.0), None, Bounds(1, 8)))
    count, queue, history = 1, 0.0, []
    for look in range(1200):
        now = 2.0 * look
        rate = 4.0 if not 400 <= now < 1400 else 30.0
        queue = max(0.0, queue + 2.0 * (rate - 8.0 * count))
        used = min(1.0, rate / (8.0 * count)) if not queue else 1.0
        loads = shards(
            count, running=round(8 * used), waiting=math.ceil(queue / count), kv=used, first=0.1 + queue / (8.0 * count)
        )
        decision = autoscaler.decide(seen(now, s=loads))
        if decision is not None:
            history.append((now, count, decision.count))
            count = decision.count
            autoscaler.succeeded(decision, now)
    at = {t: next((to for now, _, to in reversed(history) if now <= t), 1) for t in (390, 700, 1390, 2390)}
    assert at[390] == 1 and at[700] >= 4 and at[1390] >= 4 and at[2390] <= 2
    assert [now for now, a, b in history if b < a and now < 1400] == [], history
    assert [now for now, a, b in history if b > a and now > 1400] == [], history


def test_a_worker_that_was_taken_away_too_early_is_missed_for_longer():
    """A load that comes every ten minutes: after it came back too soon, the next reason to go down must hold for
    longer."""
    autoscaler = scaler(down_after=60.0, cooldown=10.0)
    count, downs = 2, []
    for look in range(3600):
        now = 2.0 * look
        busy = 0.9 if now % 600 < 120 else 0.05
        decision = autoscaler.decide(seen(now, groups(count, busy)))
        if decision is not None:
            if decision.count < count:
                downs.append(now)
            count = decision.count
            autoscaler.succeeded(decision, now)
    assert len(downs) < 12
    assert len([t for t in downs if t > 3600]) < len([t for t in downs if t <= 3600])


def test_what_was_taken_away_too_early_is_forgiven_in_time():
    """Five times ever, and a worker stayed for hours where minutes are asked."""
    autoscaler = scaler(down_after=60.0, cooldown=10.0)
    pause = autoscaler._pauses[GROUPS]
    pause.strikes, count, now, downs = 5, 4, 0.0, []
    while now < 400_000:
        busy = 0.9 if now % 80_000 < 120 else 0.05  # once a day, nearly
        decision = autoscaler.decide(seen(now, groups(count, busy)))
        if decision is not None:
            downs += [now] if decision.count < count else []
            count = decision.count
            autoscaler.succeeded(decision, now)
        now += 10.0
    assert pause.strikes < 3 and len(downs) > 3


# --- outliving a controller -----------------------------------------------------------------------


def test_pauses_outlive_a_controller_whose_clock_was_another_one():
    """Both see the same load from then on, and decide alike."""
    config = {"up_after": 10.0, "down_after": 20.0, "cooldown": 60.0}
    old = scaler(**config)
    found = first(old, [seen(t, groups(2, 1.0), shards(1)) for t in range(0, 40, 2)])
    assert found is not None
    decided, decision = found
    old.failed(decision, decided)
    seconds = old.failed(decision, decided)
    for t in (30, 3000):
        back = scaler(**config)
        back.load(json.loads(json.dumps(old.dump(decided))), now=7000.0, elapsed=float(t))
        again = first(back, [seen(7000.0 + i, groups(2, 1.0), shards(1)) for i in range(0, 4000, 2)])
        assert again is not None and again[0] - 7000.0 == pytest.approx(max(seconds - t, 10.0), abs=2)
        assert back.failed(decision, 0.0) == 2 * seconds
    assert first(old, [seen(t, groups(2, 0.1), shards(1)) for t in range(1000, 1024, 2)]) is not None
    back = scaler(**config)
    back.load(json.loads(json.dumps(old.dump(1024.0))), now=1024.0, elapsed=0.0)
    later = [seen(t, groups(1, 1.0), shards(1)) for t in range(1024, 1100, 2)]
    assert first(back, later) == first(old, later)
    # What was taken away was wanted again too soon
    assert back._pauses[GROUPS] == old._pauses[GROUPS] and old._pauses[GROUPS].strikes == 1
