"""How many drafts a step has, decided from times and acceptances that are told."""

from __future__ import annotations

import random

import pytest

from isotherm.cluster.engine.draft_lengths import PLAIN_EVERY, PROBE_AFTER, PROBE_STEPS, DraftLengths, Tries
from isotherm.cluster.engine.drafts import Candidate
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams


class World:
    """Streams whose drafts are right with a chance, and steps that take what a formula says."""

    def __init__(self, chances: list[float], row: float, drafting: float = 0.0, noise: float = 0.0, leap: float = 0.0):
        """`leap`: what the first draft of a step costs besides, and its first pass. `pace`: of the whole machine."""
        self.lengths = DraftLengths(256, 8, has_passes=drafting > 0)
        self.rng = random.Random(1)
        self.streams = [
            (ScheduledSequence(GenerationRequest(str(i), (1,), SamplingParams(9)), i, [1]), chance)
            for i, chance in enumerate(chances)
        ]
        self.row, self.pass_seconds, self.noise, self.leap, self.pace = row, drafting, noise, leap, 1.0
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
        leap = self.leap if passes else 0.0
        drafting = self.pace * (leap + sum(self.pass_seconds * (1 + 0.02 * rows) for rows in passes))
        rows = plain + sum(counts.values())
        took = self.pace * (1 + leap + self.row * (rows - 1)) * (1 + self.noise * self.rng.random())
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


def test_the_first_draft_does_not_pay_and_four_do():
    """As with a layer that guesses its own guesses well, where rows have experts of their own."""
    world = World([0.95], row=0.1, drafting=0.1, noise=0.2, leap=0.5)
    world.speed(100)
    assert world.speed(1000) > 1.45


@pytest.mark.parametrize("chance, gain", [(0.95, 1.7), (0.0, 0.97)])
def test_a_machine_that_is_slow_at_times_is_not_taken_for_slow_drafts(chance: float, gain: float):
    world = World([chance], row=0.15, drafting=0.1)
    world.speed(100)
    for pace in (3.0, 1.0, 2.0, 0.7) * 5:
        world.pace = pace
        assert world.speed(400) * pace > gain, pace


def test_drafts_that_were_slow_while_the_machine_was_pay_again_when_it_is_not():
    world = World([0.95], row=0.1, drafting=0.1)
    for _ in range(10):
        world.lengths.took(1, 1.0)
    for rows in (2, 3, 4, 5):  # measured in a bad time
        for _ in range(3):
            world.lengths.drafting_took([1] * (rows - 1), 3.0)
            world.lengths.took(rows, 6.0)
    for _ in range(30):
        world.lengths.took(1, 4.0)
    world.speed(600)
    assert world.speed(400) > 1.8


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


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.5])
def test_a_stream_that_can_be_guessed_has_drafts_soon_after_many_that_could_not(chance: float):
    """Where one draft does not pay and four do: that others' later guesses were wrong is not held against its own. They
    were away for up to 16,000 tokens."""
    for seed in range(4):
        world = World([chance], row=0.1, drafting=0.1, noise=0.2, leap=0.5)
        world.rng = random.Random(seed)
        world.speed(9000)
        for i in range(6):
            request = GenerationRequest(f"good-{i}", (1,), SamplingParams(9))
            world.streams = [(ScheduledSequence(request, i, [1]), 0.95)]
            world.speed(400)
        assert world.speed(400) > 1.3


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


def test_a_slow_first_step_does_not_make_drafts_look_free_for_long():
    world = World([0.15], row=0.3)
    world.lengths.took(1, 5.0)
    world.speed(2 * PLAIN_EVERY)
    assert world.speed(2000) > 0.97
