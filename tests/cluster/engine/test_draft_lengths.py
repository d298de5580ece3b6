"""How many drafts a step has, decided from times and acceptances that are told."""

from __future__ import annotations

import random

import pytest

from isotherm.cluster.engine.draft_lengths import PLAIN_EVERY, PROBE_AFTER, PROBE_STEPS, DraftLengths, Times, Tries
from isotherm.cluster.engine.drafts import Candidate
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams


class World:
    """Streams whose drafts are right with a chance, and steps that take what a formula says."""

    def __init__(self, chances: list[float], row: float, drafting: float = 0.0, noise: float = 0.0):
        self.lengths = DraftLengths(256, 8, has_passes=drafting > 0)
        self.rng = random.Random(1)
        self.streams = [
            (ScheduledSequence(GenerationRequest(str(i), (1,), SamplingParams(9)), i, [1]), chance)
            for i, chance in enumerate(chances)
        ]
        self.row, self.pass_seconds, self.noise = row, drafting, noise
        self.seconds, self.tokens = 0.0, 0
        self.drafts: list[list[int]] = []  # by step and stream

    def step(self) -> None:
        plain, chosen = len(self.streams), []
        if not self.lengths.skips_step():
            found = [Candidate(i, sequence, 4) for i, (sequence, _) in enumerate(self.streams)]
            chosen = self.lengths.choose(plain, found)
        counts = {one.chunk: one.count for one in chosen}
        self.drafts.append([counts.get(i, 0) for i in range(plain)])
        passes = [sum(n >= depth for n in counts.values()) for depth in range(1, 1 + max(counts.values(), default=0))]
        drafting = sum(self.pass_seconds * (1 + 0.02 * rows) for rows in passes)
        rows = plain + sum(counts.values())
        took = (1 + self.row * (rows - 1)) * (1 + self.noise * self.rng.random())
        self.lengths.drafting_took(passes, drafting)
        self.lengths.took(rows, took)
        self.seconds += took + drafting
        self.tokens += plain
        for i, count in counts.items():
            sequence, chance = self.streams[i]
            right = next((n for n in range(count) if self.rng.random() >= chance), count)
            self.lengths.verified(sequence, count, right)
            self.tokens += right

    def speed(self, steps: int) -> float:
        """÷ that of steps without drafts."""
        begin = self.tokens, self.seconds
        for _ in range(steps):
            self.step()
        plain = len(self.streams)
        return (self.tokens - begin[0]) / (self.seconds - begin[1]) * (1 + self.row * (plain - 1)) / plain


@pytest.mark.parametrize("streams", [1, 8, 32])
@pytest.mark.parametrize("drafting", [0.0, 0.2])
def test_drafts_that_are_never_right_cost_next_to_nothing(streams: int, drafting: float):
    world = World([0.0] * streams, row=0.2, drafting=drafting)
    world.speed(50)
    assert world.speed(5000) > 0.98


@pytest.mark.parametrize(("streams", "gain"), [(1, 2.8), (8, 2.0), (32, 1.2)])
def test_cheap_rows_and_right_drafts_make_it_fast(streams: int, gain: float):
    world = World([0.95] * streams, row=0.02, drafting=0.05, noise=0.2)
    world.speed(50)
    assert world.speed(500) > gain
    assert max(map(max, world.drafts)) == 4


def test_rows_that_cost_a_step_each_have_no_drafts_however_right():
    world = World([1.0] * 4, row=1.0)
    world.speed(100)
    assert world.speed(2000) > 0.97
    assert sum(map(sum, world.drafts[100:])) < 100


def test_the_streams_whose_drafts_are_right_have_them():
    world = World([0.95, 0.0, 0.95, 0.0], row=0.1)
    world.speed(300)
    tail = world.drafts[-50:]
    assert sum(step[0] + step[2] for step in tail) > 200 and sum(step[1] + step[3] for step in tail) == 0


def test_it_comes_back_when_drafts_become_right():
    world = World([0.0], row=0.1)
    world.speed(PROBE_AFTER * 4)
    world.streams = [(world.streams[0][0], 0.95)]
    world.speed(PROBE_AFTER * 12)
    assert world.speed(200) > 1.4


def test_a_step_without_drafts_is_timed_now_and_then():
    """So that what has become slow or quick is known on both sides."""
    world = World([1.0], row=0.1)
    world.speed(10 * PLAIN_EVERY)
    plain = [i for i, step in enumerate(world.drafts) if not sum(step)]
    assert 8 <= len(plain) <= 14


def test_a_probe_is_one_draft_of_one_stream_for_a_few_steps():
    world = World([0.0] * 3, row=0.5)
    while sum(map(sum, world.drafts[-PROBE_AFTER // 2 :])) or len(world.drafts) < PROBE_AFTER:
        world.step()
    begin = len(world.drafts)
    world.speed(PROBE_AFTER)
    probes = [step for step in world.drafts[begin:] if sum(step)]
    assert probes == [[0, 0, 1]] * PROBE_STEPS


def test_acceptance_by_position_counts_what_was_reached():
    tries = Tries(keep=1.0)
    tries.add(3, 3)
    tries.add(3, 1)
    tries.add(2, 0)
    assert (tries.tried, tries.right) == ([3, 2, 1], [2, 1, 1])
    assert tries.rate(0, 0.5, 0.0) == pytest.approx(2 / 3) and tries.rate(5, 0.5, 1.0) == 0.5


def test_times_are_exact_where_measured_and_grow_between_and_beyond():
    times = Times(64, 4)
    assert times.of(3) is None
    times.add(1, 1.0)
    times.add(5, 2.0)
    assert times.of(1) == 1.0 and times.of(5) == 2.0 and times.of(3) == pytest.approx(1.5)
    assert times.of(50) > times.of(20) > 2.0


def test_one_quick_step_of_many_rows_does_not_make_fewer_rows_quick():
    times = Times(64, 4)
    for _ in range(20):
        times.add(2, 1.0)
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
    assert times.of(4) == 1.0 and not times.knows(4)
    times.add(4, 1.2)
    assert times.of(4) == pytest.approx(1.1) and times.knows(4)


def test_a_slow_first_step_does_not_make_drafts_look_free_for_long():
    world = World([0.15], row=0.3)
    world.lengths.took(1, 5.0)
    world.speed(2 * PLAIN_EVERY)
    assert world.speed(2000) > 0.97


def test_a_second_time_that_is_quicker_takes_the_place_of_the_first():
    """Code and weights that nothing had touched before: drafts that paid seemed not to, for as long as a mean lasts."""
    times = Times(64, 4)
    times.add(2, 2.5)
    times.add(2, 1.0)
    assert times.of(2) == 1.0 and times.knows(2)
    times.add(2, 1.3)
    assert times.of(2) == pytest.approx(1.1)
