"""What the scheduler does for whole prompts: one that many requests share is computed once, and the log-probabilities
of its tokens are given out once each, whatever happens to the request."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Chunk, Sampled
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs


def make(**changes: int | bool) -> Scheduler:
    asked = {"block_size": 4, "blocks": 64, "max_batch_tokens": 512, "max_sequences": 32, "max_model_len": 64} | changes
    return Scheduler(SchedulerConfig(**asked))  # type: ignore[arg-type]


def score(chunk: Chunk) -> list[TokenLogprobs]:
    """As distinct as the tokens that they are of."""
    return [TokenLogprobs(-float(i)) for i in chunk.scores]


def complete(scheduler: Scheduler, chunks: Sequence[Chunk]) -> list[Delta]:
    sampled = [Sampled(7) for chunk in chunks for _ in range(chunk.samples)]
    return scheduler.complete(chunks, sampled, {c.sequence.request.id: score(c) for c in chunks if c.scores})


def run(scheduler: Scheduler) -> tuple[list[list[Chunk]], list[Delta]]:
    steps, deltas = [], []
    while len(scheduler):
        steps.append(scheduler.schedule())
        deltas += complete(scheduler, steps[-1])
        assert len(steps) < 500
    return steps, deltas


def prefilled(steps: list[list[Chunk]]) -> int:
    return sum(chunk.count for step in steps for chunk in step if chunk.start < chunk.sequence.prompt_length)


def sibling(name: str, prompt: int, family: str = "f", max_tokens: int = 3, **more: int) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(100, 100 + prompt)), SamplingParams(max_tokens, **more), family=family)


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, rest", [(30, 2), (29, 1), (32, 4), (3, 3)])
@pytest.mark.parametrize("budget", [512, 7])
def test_a_family_computes_its_prompt_once(prompt: int, rest: int, budget: int):
    """But for the last block, which each fills with its own output."""
    scheduler = make(max_batch_tokens=budget)
    for i in range(16):
        scheduler.add(sibling(f"r{i}", prompt))
    steps, deltas = run(scheduler)
    assert prefilled(steps) == prompt + 15 * rest
    assert sum(len(delta.token_ids) for delta in deltas) == 16 * 3


def test_requests_of_no_family_do_not_wait_for_each_other():
    scheduler = make()
    for i in range(4):
        scheduler.add(sibling(f"r{i}", 30, family=""))
    assert len(scheduler.schedule()) == 4


def test_others_pass_a_family_that_waits_and_it_keeps_its_place():
    scheduler = make(max_sequences=3)
    for name in ("a0", "a1", "a2"):
        scheduler.add(sibling(name, 30))
    scheduler.add(GenerationRequest("b", (1, 2), SamplingParams(9)))
    scheduler.add(GenerationRequest("c", (1, 2), SamplingParams(9)))
    first = scheduler.schedule()
    assert [chunk.sequence.request.id for chunk in first] == ["a0", "b", "c"]
    complete(scheduler, first)
    assert [s.request.id for s in scheduler.waiting] == ["a1", "a2"]


def test_the_next_of_a_family_computes_the_prompt_where_the_first_is_gone():
    scheduler = make(max_batch_tokens=8)
    for name in ("a", "b", "c"):
        scheduler.add(sibling(name, 30))
    complete(scheduler, scheduler.schedule())
    scheduler.abort("a")
    steps, deltas = run(scheduler)
    assert {delta.request_id for delta in deltas if delta.finish_reason} == {"b", "c"}
    assert prefilled(steps) == (30 - 8) + 2  # what the first had computed stays in the cache


def test_a_family_without_a_prefix_cache_has_nothing_to_wait_for():
    scheduler = make(prefix_cache=False)
    for i in range(4):
        scheduler.add(sibling(f"r{i}", 30))
    assert len(scheduler.schedule()) == 4


# --- scores ---------------------------------------------------------------------------------------


def scores(deltas: list[Delta], request_id: str) -> list[TokenLogprobs]:
    """In order, and each once."""
    out: list[TokenLogprobs] = []
    for delta in deltas:
        if delta.request_id == request_id and delta.prompt is not None:
            assert delta.prompt.start == len(out) + 1
            out += delta.prompt.tokens
    return out


EVERY = [TokenLogprobs(-float(i)) for i in range(1, 30)]


@pytest.mark.parametrize("budget", [3, 8, 512])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_every_prompt_token_but_the_first_is_scored_whatever_the_cache_holds(budget: int, max_tokens: int):
    scheduler = make(max_batch_tokens=budget)
    for again in range(2):
        scheduler.add(sibling("a", 30, "", max_tokens, prompt_logprobs=0))
        steps, deltas = run(scheduler)
        assert scores(deltas, "a") == EVERY and prefilled(steps) == 30, again
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(delta.token_ids) for delta in deltas) == max_tokens
        assert sum(chunk.sample for step in steps for chunk in step) == max_tokens


def test_a_prompt_alone_may_fill_the_context():
    scheduler = make()
    with pytest.raises(ValueError, match="prompt has 64 tokens; at most 63 leave room for the output"):
        scheduler.add(sibling("a", 64, ""))
    scheduler.add(sibling("a", 64, "", 0, prompt_logprobs=0))
    assert len(scores(run(scheduler)[1], "a")) == 63


def test_a_prompt_that_nobody_wants_scored_pays_nothing():
    scheduler = make()
    scheduler.add(sibling("a", 30, ""))
    assert all(not chunk.scores for step in run(scheduler)[0] for chunk in step)


def test_what_was_given_out_is_not_scored_again_after_a_preemption():
    rng = random.Random(3)
    for _ in range(200):
        scheduler = make(max_batch_tokens=rng.randint(1, 9))
        scheduler.add(sibling("a", 30, "", prompt_logprobs=0))
        deltas: list[Delta] = []
        while len(scheduler):
            if scheduler.running and rng.random() < 0.3 and scheduler.preemptions < 9:
                scheduler.preempt("a")
            chunks = scheduler.schedule()
            if rng.random() < 0.1 and scheduler.running and scheduler.preemptions < 9:
                scheduler.preempt("a")  # while the step is computed
            deltas += complete(scheduler, chunks)
        assert scores(deltas, "a") == EVERY


@pytest.mark.parametrize("scored", [0, 1, 17, 28, 29])
def test_a_request_that_was_resubmitted_goes_on_where_its_scores_ended(scored: int):
    scheduler = make(max_batch_tokens=8)
    for warm in (False, True):
        scheduler.add(sibling("a", 30, "", prompt_logprobs=0).resumed((), scored))
        steps, deltas = run(scheduler)
        told = [delta.prompt for delta in deltas if delta.prompt is not None]
        assert [one for part in told for one in part.tokens] == EVERY[scored:]
        assert not told or told[0].start == scored + 1
        assert prefilled(steps) == (30 - min(scored, 29) // 4 * 4 if warm else 30)


def test_siblings_of_a_scored_prompt_share_its_blocks():
    scheduler = make()
    scheduler.add(sibling("a", 30, prompt_logprobs=2))
    for i in range(3):
        scheduler.add(sibling(f"r{i}", 30))
    steps, deltas = run(scheduler)
    assert prefilled(steps) == 30 + 3 * 2 and scores(deltas, "a") == EVERY
