"""What requests get of a scheduler together: keys by their weight, and people beside background work."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Chunk, Form, Sampled
from isotherm.cluster.engine.yielding import GROWTH
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams

ALONE, PER_TOKEN = 1e-3, 1e-4  # seconds of a step of one row, and what each further token adds


def make(**changes: Any) -> Scheduler:
    asked = {"block_size": 4, "blocks": 256, "max_batch_tokens": 64, "max_sequences": 16, "max_model_len": 512}
    return Scheduler(SchedulerConfig(**(asked | changes)))


def request(name: str, prompt: int, tokens: int, **fields: Any) -> GenerationRequest:
    ids = tuple(hash((name, i)) % 1000 for i in range(prompt))
    return GenerationRequest(name, ids, SamplingParams(tokens, stop_token_ids=(1,)), **fields)


def step(scheduler: Scheduler, ends: Any = lambda sequence: False) -> list[Chunk]:
    """One, whose time is as a small processor's."""
    chunks = scheduler.schedule()
    sampled = [Sampled(1 if ends(c.sequence) else 7) for c in chunks if c.sample]
    scheduler.complete(chunks, sampled)
    if scheduler.is_shared:
        scheduler.took(chunks, ALONE + PER_TOKEN * (sum(c.count for c in chunks) - 1))
    return chunks


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (1.0, 2.5)])
def test_keys_get_tokens_by_weight_while_both_have_more_than_fits(weights):
    """One asks for short outputs and says so, the other allows for long ones and has short ones too."""
    scheduler, rng, had = make(), random.Random(3), Counter[str]()
    lengths: dict[str, int] = {}

    def fill() -> None:
        for key, weight in zip("ab", weights, strict=True):
            queued = sum(sequence.request.key == key for sequence in scheduler.waiting)
            for _ in range(12 - queued):
                name = f"{key}{len(lengths)}"
                lengths[name] = rng.randint(4, 24)
                most = lengths[name] if key == "a" else 300
                scheduler.add(request(name, rng.randint(1, 12), most, key=key, weight=weight))

    for i in range(3000):
        fill()
        for chunk in step(scheduler, lambda one: one.generated + 1 >= lengths[one.request.id]):
            if i > 500:
                had[chunk.sequence.request.key] += chunk.sample
    assert had["a"] / had["b"] == pytest.approx(weights[0] / weights[1], rel=0.1)


def test_a_conversation_keeps_its_speed_beside_a_batch_and_the_batch_gets_on():
    scheduler, seconds, of_rows = make(), 0.0, 0
    scheduler.add(request("chat", 20, 400))
    names = iter(range(10_000))
    tokens = 0
    while "chat" in scheduler.request_ids():
        while len(scheduler) < 33:
            scheduler.add(request(f"row{next(names)}", 30, 20, priority=100))
        chunks = step(scheduler)
        of_rows += sum(c.count for c in chunks if c.sequence.is_background)
        seconds += ALONE + PER_TOKEN * (sum(c.count for c in chunks) - 1)
        tokens += any(c.sequence.request.id == "chat" and c.sample for c in chunks)
    assert tokens == 400 and seconds < 1.2 * 400 * ALONE + 20 * PER_TOKEN
    assert of_rows > 0.7 * GROWTH * 400 * ALONE / PER_TOKEN, "it has what it may have"


def test_a_batch_by_itself_has_whole_steps():
    scheduler = make()
    for i in range(40):
        scheduler.add(request(f"row{i}", 30, 20, priority=100))
    assert sum(chunk.count for chunk in step(scheduler)) == 64 and not scheduler.is_shared


def test_somebody_who_comes_has_the_next_step():
    scheduler = make()
    for i in range(16):
        scheduler.add(request(f"row{i}", 3, 50, priority=100))
    step(scheduler)
    assert len(scheduler.running) == 16
    scheduler.add(request("chat", 40, 5))
    chunks = step(scheduler)
    assert [(c.sequence.request.id, c.count, c.form) for c in chunks] == [("chat", 40, Form.PREFILL)]
    assert scheduler.preemptions == 1, "all places were taken"
    while "chat" in scheduler.request_ids():
        step(scheduler)
    assert len(scheduler.running) == 15
    while len(scheduler):
        step(scheduler)


def test_rows_lose_their_blocks_to_people_within_a_step():
    scheduler = make(blocks=16, max_model_len=64)
    for i in range(4):
        scheduler.add(request(f"row{i}", 10, 30, priority=100))
    step(scheduler)
    scheduler.add(request("chat", 40, 20))
    for _ in range(500):
        step(scheduler)
    assert not len(scheduler) and scheduler.blocks.used == 0


def test_a_prompt_is_known_to_its_own_tenant_only():
    scheduler = make()
    prompt = tuple(range(40))
    cached = []
    for i, tenant in enumerate(("a", "b", "", "a", "b", "")):
        scheduler.add(GenerationRequest(f"r{i}", prompt, SamplingParams(1), tenant=tenant))
        chunks = scheduler.schedule()
        (delta,) = scheduler.complete(chunks, [Sampled(7)])
        cached.append(delta.cached_tokens)
    assert cached == [0, 0, 0, 36, 36, 36]
