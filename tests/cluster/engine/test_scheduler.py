"""The scheduler by event sequences: requests and sampled tokens in, plans and deltas out. Random ones follow at the
end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.places import QueueFullError
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import NOTED_CHUNKS, Chunk, Form, Sampled, ScheduledSequence
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs


def make(**changes: Any) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            **{"block_size": 4, "blocks": 16, "max_batch_tokens": 8, "max_sequences": 4, "max_model_len": 32} | changes
        )
    )


def request(
    name: str,
    prompt: int | list[int],
    max_tokens: int = 4,
    *,
    stop: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
) -> GenerationRequest:
    """`prompt`: token ids, or how many; then they are the request's own (so that no two requests share a prefix)."""
    tokens = [1000 * (1 + ord(name[0])) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return GenerationRequest(name, tuple(tokens), SamplingParams(max_tokens, stop_token_ids=stop), generated)


def show(chunks: list[Chunk]) -> list[str]:
    """`name form start+count`, with a `!` where a token is sampled."""
    return [f"{c.sequence.request.id} {c.form.value} {c.start}+{c.count}{'!' if c.sample else ''}" for c in chunks]


def step(scheduler: Scheduler, *tokens: int) -> tuple[list[str], list[Delta]]:
    """The next plan and the deltas it leads to. `tokens` are sampled in order; 7 where there are fewer."""
    chunks = scheduler.schedule()
    wanted = sum(c.sample for c in chunks)
    assert len(tokens) <= wanted
    sampled = [Sampled(t) for t in tokens] + [Sampled(7)] * (wanted - len(tokens))
    return show(chunks), scheduler.complete(chunks, sampled)


def plans(scheduler: Scheduler, limit: int = 50) -> list[list[str]]:
    """Every plan until nothing is left."""
    out = []
    while len(scheduler):
        out.append(step(scheduler)[0])
        assert len(out) <= limit, out
    return out


# --- room -----------------------------------------------------------------------------------------


def test_a_new_request_beyond_the_bound_is_refused():
    scheduler = make(max_sequences=2, max_waiting=1)
    for name in "abc":
        scheduler.add(request(name, 2))
    with pytest.raises(QueueFullError, match="at this shard 3 requests are running or waiting, and 3 may"):
        scheduler.add(request("d", 2))
    assert scheduler.request_ids() == ["a", "b", "c"]
    scheduler.abort("b")
    scheduler.add(request("d", 2))


def test_a_request_that_was_accepted_before_always_has_room():
    scheduler = make(max_sequences=1, max_waiting=0)
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2).resumed(()))
    scheduler.add(request("c", 2, generated=(5,)))
    with pytest.raises(QueueFullError):
        scheduler.add(request("d", 2))
    assert len(plans(scheduler)) > 0 and len(scheduler) == 0


def test_tokens_bound_the_queue_too():
    scheduler = make(max_waiting=100, max_waiting_tokens=16)
    assert scheduler.config.room.tokens == 64 + 16
    for name in "abcd":
        scheduler.add(request(name, 10, 10))
    with pytest.raises(QueueFullError, match="at this shard the requests .* have 80 tokens, and 80 fit"):
        scheduler.add(request("e", 2))
    scheduler.abort("b")
    scheduler.add(request("e", 2))


def test_rows_of_a_batch_leave_room_for_people():
    scheduler = make(max_sequences=2, max_waiting=1)
    for name in "abc":
        scheduler.add(replace(request(name, 2), priority=100))
    with pytest.raises(QueueFullError):
        scheduler.add(replace(request("d", 2), priority=100))
    scheduler.add(request("e", 2))


def test_without_a_bound_any_number_waits():
    scheduler = make(max_sequences=1)
    for i in range(300):
        scheduler.add(request(f"{i}", [i, 1]))
    assert len(scheduler) == 300


def test_a_place_that_becomes_free_is_taken_although_the_free_blocks_are_as_many_as_before():
    """The block that one gives back at its end is taken at once by another that goes on."""
    scheduler = make(max_sequences=2, prefix_cache=False)
    scheduler.add(request("b", 6, max_tokens=20))
    step(scheduler)
    scheduler.add(request("a", 2, max_tokens=2))
    scheduler.add(request("c", 2))
    assert step(scheduler)[0] == ["b decode 6+1!", "a prefill 0+2!"]
    assert step(scheduler)[0] == ["b decode 7+1!", "a decode 2+1!"]
    assert step(scheduler)[0] == ["b decode 8+1!", "c prefill 0+2!"]


# --- priority -------------------------------------------------------------------------------------


def of_class(priority: int, name: str, prompt: int, **changes: Any) -> GenerationRequest:
    return replace(request(name, prompt, **changes), priority=priority)


def test_a_better_class_does_not_wait_for_a_long_prompt():
    scheduler = make(max_batch_tokens=8)
    scheduler.add(of_class(0, "a", 24))
    assert step(scheduler)[0] == ["a prefill 0+8"]
    scheduler.add(of_class(-5, "b", 5))
    scheduler.add(of_class(0, "c", 2))
    assert step(scheduler)[0] == ["b prefill 0+5!", "a prefill 8+3"]


def test_a_worse_class_gives_its_blocks_to_a_better_one_and_goes_on_later():
    scheduler = make(blocks=8, max_batch_tokens=32, prefix_cache=False)
    scheduler.add(of_class(0, "a", 12, max_tokens=8))
    step(scheduler)
    scheduler.add(of_class(-5, "b", 20, max_tokens=2))
    assert step(scheduler)[0] == ["b prefill 0+20!"] and scheduler.preemptions == 1
    assert [plan for plan in plans(scheduler) if any("a prefill" in c for c in plan)] == [["a prefill 0+12"]]


def test_one_of_a_better_class_takes_the_place_of_another():
    scheduler = make(max_sequences=1)
    scheduler.add(of_class(0, "a", 4))
    step(scheduler)
    scheduler.add(of_class(0, "c", 4))
    assert step(scheduler)[0] == ["a decode 4+1!"]
    scheduler.add(of_class(-5, "b", 4))
    assert step(scheduler)[0] == ["b prefill 0+4!"]


def test_nobody_gives_way_in_vain():
    scheduler = make(block_size=1, blocks=10, max_model_len=10, max_batch_tokens=16)
    for one in (of_class(-5, "a", 3), of_class(0, "b", 2)):
        scheduler.add(one)
        step(scheduler)
    scheduler.add(of_class(-5, "c", 9))  # it does not fit beside a, whoever else gives way
    assert [c[0] for c in step(scheduler)[0]] == ["a", "b"] and scheduler.preemptions == 0


def test_blocks_that_come_to_be_known_let_one_in_that_waits():
    """Two prompts that begin alike: the second needs hardly any block that the first has not computed."""
    prompt = list(range(17))
    scheduler = make(blocks=7, max_batch_tokens=4, max_model_len=28)
    scheduler.add(request("a", prompt))
    step(scheduler)
    scheduler.add(request("b", prompt))
    later = [step(scheduler)[0] for _ in range(5)]
    assert any("b prefill" in chunk for plan in later for chunk in plan), later


# --- one request ----------------------------------------------------------------------------------


def test_an_idle_scheduler_plans_nothing():
    scheduler = make()
    assert scheduler.schedule() == [] and scheduler.complete([], []) == [] and len(scheduler) == 0


def test_life_of_one_request():
    scheduler = make()
    scheduler.add(request("a", 5, max_tokens=3))
    assert len(scheduler) == 1 and scheduler.request_ids() == ["a"]
    assert step(scheduler, 50) == (["a prefill 0+5!"], [Delta("a", 0, (50,))])
    assert step(scheduler, 51) == (["a decode 5+1!"], [Delta("a", 1, (51,))])
    assert step(scheduler, 52) == (["a decode 6+1!"], [Delta("a", 2, (52,), FinishReason.LENGTH)])
    assert scheduler.schedule() == [] and len(scheduler) == 0 and scheduler.blocks.used == 0


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", 19, max_tokens=1))
    assert plans(scheduler) == [["a prefill 0+8"], ["a prefill 8+8"], ["a prefill 16+3!"]]


def test_blocks_are_taken_only_as_tokens_need_them():
    scheduler = make(block_size=4, max_batch_tokens=4)
    scheduler.add(request("a", 8, max_tokens=2))
    used = []
    while len(scheduler):
        chunks = scheduler.schedule()
        used.append(scheduler.blocks.used)
        scheduler.complete(chunks, [Sampled(7)] * sum(c.sample for c in chunks))
    assert used == [1, 2, 3]


def test_log_probabilities_are_handed_through():
    scheduler = make()
    scheduler.add(request("a", 2))
    chunks = scheduler.schedule()
    logprobs = TokenLogprobs(-0.5, ((9, -0.5),))
    assert scheduler.complete(chunks, [Sampled(9, logprobs)]) == [Delta("a", 0, (9,), None, (logprobs,))]


# --- several requests -----------------------------------------------------------------------------


def test_decodes_come_before_chunks_of_prompts():
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", 3))
    assert step(scheduler)[0] == ["a prefill 0+3!"]
    scheduler.add(request("b", 12))
    assert step(scheduler)[0] == ["a decode 3+1!", "b prefill 0+7"]
    scheduler.add(request("c", 2))
    assert step(scheduler)[0] == ["a decode 4+1!", "b prefill 7+5!", "c prefill 0+2!"]
    assert step(scheduler)[0] == ["a decode 5+1!", "b decode 12+1!", "c decode 2+1!"]


def test_a_chunk_under_way_goes_on_before_new_requests():
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", 12))
    scheduler.add(request("b", 3))
    assert step(scheduler)[0] == ["a prefill 0+8"]
    assert step(scheduler)[0] == ["a prefill 8+4!", "b prefill 0+3!"]


def test_sampled_tokens_go_to_their_requests_in_order():
    scheduler = make(max_batch_tokens=8)
    for name, length in (("a", 2), ("b", 20), ("c", 1)):
        scheduler.add(request(name, length))
    plan, deltas = step(scheduler, 50)
    assert plan == ["a prefill 0+2!", "b prefill 0+6"]
    assert deltas == [Delta("a", 0, (50,))]
    step(scheduler)
    plan, deltas = step(scheduler, 60, 61)
    assert plan == ["a decode 3+1!", "b prefill 13+7!"]  # b's chunk does not sample in the step before
    assert deltas == [Delta("a", 2, (60,)), Delta("b", 0, (61,))]


def test_requests_are_admitted_in_the_order_they_came():
    scheduler = make(max_batch_tokens=8, max_sequences=2)
    for name in "abc":
        scheduler.add(request(name, 2, max_tokens=2))
    assert plans(scheduler) == [
        ["a prefill 0+2!", "b prefill 0+2!"],
        ["a decode 2+1!", "b decode 2+1!"],
        ["c prefill 0+2!"],
        ["c decode 2+1!"],
    ]


def test_a_request_that_does_not_fit_holds_up_those_behind_it():
    """Or a long one could wait for ever behind short ones."""
    scheduler = make(blocks=4, max_model_len=16, max_batch_tokens=16)
    scheduler.add(request("a", 4, max_tokens=2))
    step(scheduler)
    scheduler.add(request("b", 14, max_tokens=1))
    scheduler.add(request("c", 1, max_tokens=1))
    assert step(scheduler)[0] == ["a decode 4+1!"]
    assert step(scheduler)[0] == ["b prefill 0+14!"]
    assert step(scheduler)[0] == ["c prefill 0+1!"]


def test_an_admitted_chunk_in_decode_form_also_comes_before_prompts():
    """c's whole prompt is in the prefix cache: it begins with the tokens that it had generated."""
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request("x", list(range(8)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("x", list(range(9)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("a", 6))
    scheduler.add(request("c", list(range(8)), max_tokens=9, generated=(50, 51)))
    assert step(scheduler, 60, 61) == (
        ["c decode 8+2!", "a prefill 0+6!"],
        [Delta("c", 2, (60,), cached_tokens=8), Delta("a", 0, (61,))],
    )


def test_a_budget_below_the_number_of_decodes_serves_the_oldest():
    scheduler = make(max_batch_tokens=2)
    for name in "abc":
        scheduler.add(request(name, 1, max_tokens=2))
    assert plans(scheduler) == [
        ["a prefill 0+1!", "b prefill 0+1!"],
        ["a decode 1+1!", "b decode 1+1!"],
        ["c prefill 0+1!"],
        ["c decode 1+1!"],
    ]


# --- ends -----------------------------------------------------------------------------------------


def test_a_stop_token_is_given_and_ends_the_request():
    scheduler = make()
    scheduler.add(request("a", 2, max_tokens=9, stop=(3, 5)))
    step(scheduler, 4)
    assert step(scheduler, 5)[1] == [Delta("a", 1, (5,), FinishReason.STOP)]
    assert len(scheduler) == 0 and scheduler.blocks.used == 0


def test_a_stop_token_as_the_last_allowed_one_is_a_stop():
    scheduler = make()
    scheduler.add(request("a", 2, max_tokens=1, stop=(5,)))
    assert step(scheduler, 5)[1] == [Delta("a", 0, (5,), FinishReason.STOP)]


def test_a_stop_token_in_the_prompt_is_no_stop():
    scheduler = make()
    scheduler.add(request("a", [5, 5, 5], max_tokens=1, stop=(5,)))
    assert step(scheduler, 6)[1] == [Delta("a", 0, (6,), FinishReason.LENGTH)]


def test_prompt_and_output_end_at_max_model_len():
    scheduler = make(max_model_len=8)
    scheduler.add(request("a", 6, max_tokens=100))
    assert step(scheduler)[1] == [Delta("a", 0, (7,))]
    assert step(scheduler)[1] == [Delta("a", 1, (7,), FinishReason.LENGTH)]


def test_a_sequence_may_fill_the_whole_cache():
    scheduler = make(blocks=2, max_model_len=8, max_batch_tokens=100)
    scheduler.add(request("a", 7, max_tokens=100))
    assert plans(scheduler) == [["a prefill 0+7!"]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", []), "prompt is empty"),
        (request("a", 32), "prompt has 32 tokens; at most 31"),
        (
            request("a", 4, max_tokens=3, generated=(1, 2, 3)),
            "resumes after 3 output tokens, of which it may have only 3",
        ),
        (
            request("a", 30, max_tokens=9, generated=(1, 2)),
            "resumes after 2 output tokens, of which it may have only 2",
        ),
        (request("b", 3), "request id b is in use"),
    ],
    ids=["empty", "too-long", "resumed-at-its-end", "resumed-at-the-length-limit", "same-id"],
)
def test_requests_that_can_never_be_served_are_refused(bad: GenerationRequest, message: str):
    scheduler = make()
    scheduler.add(request("b", 3, max_tokens=1))
    with pytest.raises(ValueError, match=message):
        scheduler.add(bad)
    assert plans(scheduler) == [["b prefill 0+3!"]]


def test_an_id_can_be_used_again_when_its_request_is_over():
    scheduler = make()
    for _ in range(2):
        scheduler.add(request("a", 3, max_tokens=1))
        assert len(plans(scheduler)) == 1


@pytest.mark.parametrize("name", ["block_size", "blocks", "max_batch_tokens", "max_sequences", "max_model_len"])
def test_config_values_below_one_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        make(**{name: 0})


def test_a_cache_smaller_than_one_sequence_is_refused():
    make(blocks=8, max_model_len=32)
    with pytest.raises(ValueError, match="max_model_len 33 does not fit into 8 KV blocks of 4 tokens"):
        make(blocks=8, max_model_len=33)


# --- abort ----------------------------------------------------------------------------------------


def between_steps(steps: int) -> Callable[[Scheduler], None]:
    def prepare(scheduler: Scheduler) -> None:
        for _ in range(steps):
            step(scheduler)

    return prepare


def preempted(scheduler: Scheduler) -> None:
    step(scheduler)
    scheduler.preempt("a")


@pytest.mark.parametrize(
    "prepare",
    [between_steps(0), between_steps(1), between_steps(2), between_steps(4), preempted],
    ids=["waiting", "in-its-prompt", "prompt-done", "generating", "preempted"],
)
def test_abort_frees_a_request_in_every_state(prepare: Callable[[Scheduler], None]):
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", 16, max_tokens=9))
    prepare(scheduler)
    assert scheduler.abort("a") is True
    assert (len(scheduler), scheduler.request_ids(), scheduler.blocks.used) == (0, [], 0)
    assert scheduler.abort("a") is False
    assert scheduler.schedule() == []


def test_abort_lets_the_others_go_on():
    scheduler = make()
    for name in "abc":
        scheduler.add(request(name, 2, max_tokens=2))
    step(scheduler)
    scheduler.abort("b")
    assert step(scheduler, 60, 61)[1] == [
        Delta("a", 1, (60,), FinishReason.LENGTH),
        Delta("c", 1, (61,), FinishReason.LENGTH),
    ]


@pytest.mark.parametrize("change", [Scheduler.abort, Scheduler.preempt])
def test_a_request_that_left_while_its_step_was_computed_gets_nothing(change: Callable[[Scheduler, str], Any]):
    """Its blocks may be another's by then: a key given to them now would show that other's tokens to a third
    request."""
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, 4, max_tokens=3))
    chunks = scheduler.schedule()
    assert show(chunks) == ["a prefill 0+4!", "b prefill 0+4!"]
    change(scheduler, "a")
    assert scheduler.complete(chunks, [Sampled(50), Sampled(60)]) == [Delta("b", 0, (60,))]
    assert (scheduler.blocks.used, scheduler.blocks.cached) == (1, 0)


# --- preemption -----------------------------------------------------------------------------------


def test_the_last_to_come_gives_way_and_is_recomputed_in_the_same_forms():
    scheduler = make(blocks=4, max_model_len=16, max_batch_tokens=16, prefix_cache=False)
    scheduler.add(request("a", 6, max_tokens=6))
    scheduler.add(request("b", 6, max_tokens=4))
    assert plans(scheduler) == [
        ["a prefill 0+6!", "b prefill 0+6!"],
        ["a decode 6+1!", "b decode 6+1!"],
        ["a decode 7+1!", "b decode 7+1!"],
        ["a decode 8+1!"],  # needs a fifth block: b's
        ["a decode 9+1!"],
        ["a decode 10+1!"],
        ["b prefill 0+6"],
        ["b decode 6+3!"],
    ]
    assert scheduler.preemptions == 1


def test_a_preempted_request_waits_at_the_head_of_the_queue():
    scheduler = make(max_sequences=2, prefix_cache=False)
    for name in "abc":
        scheduler.add(request(name, 2, max_tokens=3))
    step(scheduler)
    scheduler.preempt("b")
    assert step(scheduler)[0] == ["a decode 2+1!", "b prefill 0+2"]
    assert step(scheduler)[0] == ["a decode 3+1!", "b decode 2+1!"]


def test_a_request_that_comes_back_has_its_old_place():
    """Among decodes, and as the one that keeps its blocks."""
    scheduler = make(blocks=4, max_model_len=16, max_batch_tokens=16, prefix_cache=False)
    scheduler.add(request("a", 6, max_tokens=6))
    scheduler.add(request("b", 6, max_tokens=6))
    step(scheduler)
    scheduler.preempt("a")
    assert step(scheduler)[0] == ["b decode 6+1!", "a prefill 0+6"]
    assert step(scheduler)[0] == ["a decode 6+1!", "b decode 7+1!"]
    # b, the younger, needed a fifth block and gave way; it waits for room for all its tokens
    assert step(scheduler)[0] == ["a decode 7+1!"]


def test_preemption_gives_back_blocks_and_keeps_tokens():
    scheduler = make(prefix_cache=False)
    scheduler.add(request("a", 6, max_tokens=5))
    for token in (50, 51, 52):
        step(scheduler, token)
    scheduler.preempt("a")
    assert (scheduler.blocks.used, len(scheduler), scheduler.preemptions) == (0, 1, 1)
    assert step(scheduler) == (["a prefill 0+6"], [])
    assert step(scheduler, 53) == (["a decode 6+3!"], [Delta("a", 3, (53,))])
    assert step(scheduler, 54) == (["a decode 9+1!"], [Delta("a", 4, (54,), FinishReason.LENGTH)])


def test_a_recomputed_chunk_never_crosses_the_end_of_the_prompt():
    scheduler = make(max_batch_tokens=4, prefix_cache=False)
    scheduler.add(request("a", 6, max_tokens=9))
    for _ in range(6):
        step(scheduler)
    scheduler.preempt("a")
    assert [step(scheduler)[0] for _ in range(4)] == [
        ["a prefill 0+4"],
        ["a prefill 4+2"],
        ["a decode 6+4"],
        ["a decode 10+1!"],
    ]


@pytest.mark.parametrize("blocks", [3, 4])
def test_a_decode_planned_before_its_request_was_preempted_is_not_computed(blocks: int):
    """a resumes with nine tokens to recompute: they need b's blocks after b's decode was planned. b does not come back
    in the same step, though with 4 blocks its first tokens would fit."""
    scheduler = make(blocks=blocks, max_model_len=12, max_batch_tokens=16, prefix_cache=False)
    scheduler.add(request("a", 2, max_tokens=10, generated=(1, 2, 3, 4, 5, 6, 7, 8, 9)))
    scheduler.add(request("b", 4, max_tokens=9))
    assert step(scheduler)[0] == ["a prefill 0+2", "b prefill 0+4!"]
    assert step(scheduler) == (["a decode 2+9!"], [Delta("a", 9, (7,), FinishReason.LENGTH)])


# --- prefix cache ---------------------------------------------------------------------------------


def test_a_shared_prefix_is_not_computed_again():
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request("a", list(range(10)), max_tokens=1))
    assert step(scheduler)[1] == [Delta("a", 0, (7,), FinishReason.LENGTH, cached_tokens=0)]
    scheduler.add(request("b", [*range(9), 99, 98], max_tokens=1))
    assert step(scheduler) == (["b prefill 8+3!"], [Delta("b", 0, (7,), FinishReason.LENGTH, cached_tokens=8)])


def test_the_last_token_is_always_computed():
    scheduler = make(max_batch_tokens=16)
    for name in "ab":
        scheduler.add(request(name, list(range(8)), max_tokens=1))
        plan = plans(scheduler)
    assert plan == [["b prefill 4+4!"]]  # two full blocks are held, but the second has the last token


def test_blocks_are_shared_while_their_first_owner_still_runs():
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request("a", list(range(9)), max_tokens=5))
    step(scheduler)
    scheduler.add(request("b", list(range(9)), max_tokens=5))
    assert step(scheduler)[0] == ["a decode 9+1!", "b prefill 8+1!"]
    assert scheduler.blocks.used == 4  # two shared, one each
    scheduler.abort("a")
    assert scheduler.blocks.used == 3
    scheduler.abort("b")
    assert (scheduler.blocks.used, scheduler.blocks.cached) == (0, 2)


def test_a_block_that_is_not_full_or_not_yet_computed_is_not_shared():
    scheduler = make(max_batch_tokens=6)
    scheduler.add(request("a", list(range(8)), max_tokens=1))
    assert step(scheduler)[0] == ["a prefill 0+6"]
    scheduler.add(request("b", [*range(8), 8], max_tokens=1))
    assert step(scheduler)[0] == ["a prefill 6+2!", "b prefill 4+4"]


def test_generated_tokens_are_shared_only_with_those_that_generated_them():
    """The second turn of a chat has the first one's answer in its prompt: computed in prefill form, so the answer's
    blocks are not the same."""
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request("a", [0, 1, 2, 3, 4], max_tokens=12))
    for token in range(5, 17):
        step(scheduler, token)
    assert len(scheduler) == 0
    scheduler.add(request("b", list(range(16)), max_tokens=1))
    assert step(scheduler)[0] == ["b prefill 4+12!"]  # not 12+4: block 1 has one prompt token and three generated ones
    scheduler.add(request("c", [0, 1, 2, 3, 4], max_tokens=12, generated=tuple(range(5, 15))))
    plan, deltas = step(scheduler)
    assert plan == ["c decode 12+3!"]
    assert deltas == [Delta("c", 10, (7,), None, cached_tokens=5)]


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request("a", 6, max_tokens=9))
    for _ in range(4):
        step(scheduler)
    scheduler.preempt("a")
    # cached_tokens tells of the first admission only
    assert step(scheduler) == (["a decode 8+2!"], [Delta("a", 4, (7,))])


def test_without_a_prefix_cache_nothing_is_shared_or_kept():
    scheduler = make(max_batch_tokens=16, prefix_cache=False)
    for name in "ab":
        scheduler.add(request(name, list(range(9)), max_tokens=1))
        assert plans(scheduler) == [[f"{name} prefill 0+9!"]]
    assert scheduler.blocks.cached == 0


def test_an_evicted_prefix_is_computed_again():
    scheduler = make(blocks=4, max_model_len=16, max_batch_tokens=16)
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    plans(scheduler)
    scheduler.add(request("x", 15, max_tokens=1))
    plans(scheduler)
    scheduler.add(request("b", list(range(9)), max_tokens=1))
    assert plans(scheduler) == [["b prefill 0+9!"]]


def test_a_prefix_hit_that_cannot_be_admitted_gives_its_blocks_back():
    scheduler = make(blocks=4, max_model_len=16, max_batch_tokens=16)
    scheduler.add(request("a", list(range(8)), max_tokens=8))
    step(scheduler)
    scheduler.add(request("b", [*range(8), *range(20, 27)], max_tokens=1))
    assert step(scheduler)[0] == ["a decode 8+1!"]  # b found two blocks, but needs two more of the one that is left
    assert scheduler.blocks.used == 3
    scheduler.abort("a")
    assert step(scheduler) == (["b prefill 8+7!"], [Delta("b", 0, (7,), FinishReason.LENGTH, cached_tokens=8)])
    assert scheduler.blocks.used == 0


# --- resumed requests -----------------------------------------------------------------------------


def test_a_resumed_request_recomputes_its_output_in_decode_form_and_goes_on_from_there():
    scheduler = make(max_batch_tokens=16)
    scheduler.add(request("a", 5, max_tokens=5, generated=(50, 51, 52)))
    assert step(scheduler) == (["a prefill 0+5"], [])
    assert step(scheduler, 53) == (["a decode 5+3!"], [Delta("a", 3, (53,))])
    assert step(scheduler, 54) == (["a decode 8+1!"], [Delta("a", 4, (54,), FinishReason.LENGTH)])


# --- random sequences of events -------------------------------------------------------------------

VOCABULARY = 2  # so that prefixes are often equal
STOP = VOCABULARY  # sampled now and then
# A cached position: all tokens up to it, how many of them were computed in prefill form, and for whom
Content = tuple[tuple[int, ...], int, str]


class SchedulerMachine(RuleBasedStateMachine):
    """Runs plans on a cache that remembers, for every slot, which tokens it was computed from and in which form. A
    sequence that reads anything but its own past (a block shared too early, given away too late, or found under a wrong
    key) is caught when it reads."""

    @initialize(
        blocks=st.integers(3, 12),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 12),
        sequences=st.integers(1, 5),
        prefix_cache=st.booleans(),
        data=st.data(),
    )
    def start(
        self, blocks: int, block_size: int, budget: int, sequences: int, prefix_cache: bool, data: st.DataObject
    ) -> None:
        longest = data.draw(st.integers(2, blocks * block_size))
        self.scheduler = Scheduler(SchedulerConfig(block_size, blocks, budget, sequences, longest, prefix_cache))
        self.cache: dict[tuple[int, int], Content] = {}
        self.requests: dict[str, GenerationRequest] = {}
        self.output: dict[str, list[int]] = {}
        self.scored: dict[str, int] = {}  # by request: prompt tokens that were scored
        self.computed: dict[
            str, int
        ] = {}  # by request: positions computed since it was last admitted; absent while it waits
        self.added, self.in_step = 0, False

    @rule(data=st.data(), prompt=st.integers(1, 30), generated=st.integers(0, 6), max_tokens=st.integers(0, 12))
    def add(self, data: st.DataObject, prompt: int, generated: int, max_tokens: int) -> None:
        longest = self.scheduler.config.max_model_len
        prompt = min(prompt, longest - min(1, max_tokens))
        generated = max(0, min(generated, max_tokens - 1, longest - prompt - 1))
        tokens = data.draw(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=prompt + generated, max_size=prompt + generated)
        )
        self.added += 1
        new = request(f"r{self.added}", tokens[:prompt], max_tokens, stop=(STOP,), generated=tuple(tokens[prompt:]))
        new = replace(new, priority=data.draw(st.sampled_from([0, 0, 5])), key=data.draw(st.sampled_from("ab")))
        new = replace(new, weight=data.draw(st.sampled_from([1.0, 3.0])), tenant=data.draw(st.sampled_from(["", "t"])))
        if data.draw(st.booleans()):
            scored = prompt - 1 if generated else data.draw(st.integers(0, prompt - 1))
            new = replace(new, params=replace(new.params, prompt_logprobs=0), scored=scored)
        self.put(replace(new, family=new.id))

    @rule(data=st.data(), max_tokens=st.integers(0, 6))
    def add_another_of_a_family(self, data: st.DataObject, max_tokens: int) -> None:
        if self.requests:
            first = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
            self.added += 1
            fills = len(first.prompt) == self.scheduler.config.max_model_len
            params = SamplingParams(0 if fills else max_tokens, stop_token_ids=(STOP,))
            self.put(replace(first, id=f"r{self.added}", params=params, generated=(), scored=0))

    def put(self, new: GenerationRequest) -> None:
        self.scheduler.add(new)
        self.requests[new.id], self.output[new.id], self.scored[new.id] = new, list(new.generated), new.scored

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.run_step(lambda: data.draw(st.sampled_from([0, 0, 0, 1, 1, 1, STOP])))

    @rule(data=st.data(), kind=st.sampled_from(["abort", "preempt"]))
    def step_during_which_one_leaves(self, data: st.DataObject, kind: str) -> None:
        self.run_step(lambda: 0, lambda: self.leave(data, kind))

    @rule(data=st.data(), kind=st.sampled_from(["abort", "preempt"]))
    def leave(self, data: st.DataObject, kind: str) -> None:
        candidates = sorted(self.requests) if kind == "abort" else [s.request.id for s in self.scheduler.running]
        if candidates:
            name = data.draw(st.sampled_from(candidates))
            if kind == "abort":
                assert self.scheduler.abort(name)
                self.forget(name)
            else:
                self.scheduler.preempt(name)

    def forget(self, name: str) -> None:
        del self.requests[name], self.output[name], self.scored[name]
        self.computed.pop(name, None)

    def run_step(self, sample: Callable[[], int], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.in_step = True
        preemptions = {s.request.id: s.preemptions for s in self.scheduler.running}
        chunks = self.scheduler.schedule()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            # Not admitted before, or preempted and perhaps admitted again
            if sequence.preemptions != preemptions.get(sequence.request.id):
                self.computed.pop(sequence.request.id, None)
        assert bool(chunks) == bool(self.requests), "a step must make progress"
        assert sum(c.count for c in chunks) <= self.scheduler.config.max_batch_tokens
        forms = [c.form for c in chunks]
        assert forms == sorted(forms, key=lambda f: f is Form.PREFILL), "decodes come first"
        names = [c.sequence.request.id for c in chunks]
        assert len(set(names)) == len(names)
        for chunk in chunks:
            self.check_and_compute(chunk)
        sampled = [Sampled(sample()) for c in chunks if c.sample]
        results = iter(sampled)
        # The tokens that each is to be given, and indices of the prompt tokens that are scored.
        expected = {
            c.sequence.request.id: ((next(results).token_id,) if c.sample else (), list(c.scores))
            for c in chunks
            if c.sample or c.scores or (c.known == c.sequence.remaining and not c.sequence.request.params.max_tokens)
        }
        scores = {c.sequence.request.id: [TokenLogprobs(-float(i)) for i in c.scores] for c in chunks if c.scores}
        meanwhile()
        still = {s.request.id for s in self.scheduler.running}
        deltas = self.scheduler.complete(chunks, sampled, scores)
        if self.scheduler.is_shared:
            self.scheduler.took(chunks, 1 + sum(c.count for c in chunks) / 5)
        assert [d.request_id for d in deltas] == [name for name in expected if name in still]
        for delta in deltas:
            self.check_delta(delta, *expected[delta.request_id])
        self.in_step = False

    def check_and_compute(self, chunk: Chunk) -> None:
        sequence, size = chunk.sequence, self.scheduler.config.block_size
        name, prompt, end = sequence.request.id, len(sequence.request.prompt), chunk.start + chunk.count
        assert chunk.count >= 1 and end <= len(sequence.tokens)
        assert chunk.form is (Form.PREFILL if chunk.start < prompt else Form.DECODE)
        assert chunk.start >= prompt or end <= prompt, "a chunk has one form"
        assert chunk.sample == (end == len(sequence.tokens) and sequence.request.params.max_tokens > 0)
        assert sequence.is_scored or chunk.start <= sequence.scored, "no row is passed over whose logits are wanted"
        if name not in self.computed:  # newly admitted: what it begins with came from the prefix cache
            assert chunk.start % size == 0 and chunk.start < len(sequence.tokens)
            assert chunk.start == 0 or self.scheduler.config.prefix_cache
        else:
            assert chunk.start == self.computed[name], "each position is computed once per admission"
        self.computed[name] = end
        assert len(sequence.blocks) == -(-end // size), "no block is held before it is needed"
        shared = {b for s in self.scheduler.running if s is not sequence for b in s.blocks}
        for position in range(end):
            block, content = (
                sequence.blocks[position // size],
                (tuple(sequence.tokens[: position + 1]), min(prompt, position + 1), sequence.request.tenant),
            )
            if position >= chunk.start:
                assert block not in shared, "a block that is written has one owner"
                self.cache[block, position % size] = content
            else:
                assert self.cache[block, position % size] == content, "a sequence reads its own past only"

    def check_delta(self, delta: Delta, tokens: tuple[int, ...], scores: list[int]) -> None:
        name, asked = delta.request_id, self.requests[delta.request_id]
        output = self.output[name]
        assert (delta.start, delta.token_ids) == (len(output), tokens)
        output += tokens
        if scores:
            assert delta.prompt is not None and delta.prompt.start == self.scored[name] + 1 == scores[0]
            assert [int(-one.chosen) for one in delta.prompt.tokens] == scores
            self.scored[name] += len(scores)
        at_limit = (
            len(output) == asked.params.max_tokens
            or len(asked.prompt) + len(output) == self.scheduler.config.max_model_len
        )
        whole = self.computed[name] == len(asked.prompt)
        at_limit = at_limit and bool(tokens) if asked.params.max_tokens else whole
        reason = FinishReason.STOP if STOP in tokens else FinishReason.LENGTH if at_limit else None
        assert delta.finish_reason is reason
        if reason is not None and asked.params.prompt_logprobs is not None:
            assert self.scored[name] == len(asked.prompt) - 1, "every prompt token but the first is scored, once"
        assert 0 <= delta.cached_tokens <= len(asked.prompt)
        if reason is not None:
            self.forget(name)

    @invariant()
    def bookkeeping(self) -> None:
        scheduler = self.scheduler
        if not hasattr(self, "added"):
            return
        waiting: list[ScheduledSequence] = list(scheduler.waiting)
        assert (
            {s.request.id for s in [*waiting, *scheduler.running]} == set(self.requests) == set(scheduler.request_ids())
        )
        assert len(waiting) + len(scheduler.running) == len(scheduler) == len(self.requests)
        assert len(scheduler.running) <= scheduler.config.max_sequences
        order = [(s.request.priority, s.arrival) for s in scheduler.running]
        assert order == sorted(order)
        assert all(not s.blocks and s.computed == 0 for s in waiting)
        for sequence in waiting:
            self.computed.pop(sequence.request.id, None)
        for sequence in scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
        held = {b for s in scheduler.running for b in s.blocks}
        assert scheduler.blocks.used == len(held)
        assert scheduler.blocks.used + scheduler.blocks.available == scheduler.config.blocks
        for sequence in [*waiting, *scheduler.running]:
            assert sequence.tokens == [*sequence.request.prompt, *self.output[sequence.request.id]]

    def teardown(self) -> None:
        """Everything that is left finishes, and nothing stays in use."""
        if not hasattr(self, "added") or self.in_step:  # a check has failed already
            return
        steps_needed = (
            sum(len(r.prompt) + r.params.max_tokens for r in self.requests.values()) * (1 + len(self.requests)) ** 2
        )
        for _ in range(steps_needed):
            if not self.requests:
                break
            self.run_step(lambda: 1)
            self.bookkeeping()
        assert not self.requests and len(self.scheduler) == 0
        assert self.scheduler.blocks.used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, report_multiple_bugs=False)


def test_a_request_is_told_its_course_with_its_first_tokens_and_its_last():
    now = iter(float(i) for i in range(100))
    config = SchedulerConfig(block_size=4, blocks=16, max_batch_tokens=8, max_sequences=4, max_model_len=32)
    scheduler = Scheduler(config, clock=lambda: next(now))
    scheduler.waited = 5.0
    scheduler.add(request("a", 10, 3))  # at 0; its turn is at 1
    courses = []
    while len(scheduler):
        for delta in step(scheduler)[1]:
            courses.append(delta.course)
        scheduler.waited += 0.25
    assert [course and course.chunks for course in courses] == [((2.0, 8), (3.0, 2)), None, ((2.0, 8), (3.0, 2))]
    assert courses[0].group_wait == 0.25 and courses[2].group_wait == 0.75


def test_a_very_long_prompts_later_chunks_are_told_as_one():
    scheduler = make(blocks=200, max_model_len=800, max_batch_tokens=4)
    scheduler.add(request("a", 4 * (NOTED_CHUNKS + 3), 1))
    (delta,) = [delta for _ in range(NOTED_CHUNKS + 3) for delta in step(scheduler)[1]]
    assert [count for _, count in delta.course.chunks] == [4] * (NOTED_CHUNKS - 1) + [16]


def test_prompt_tokens_are_looked_up_once_a_request():
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, list(range(9)), 1))
        plans(scheduler)
    assert (scheduler.looked_up, scheduler.found) == (18, 8)
    scheduler = make(prefix_cache=False)
    scheduler.add(request("a", 9, 1))
    plans(scheduler)
    assert (scheduler.looked_up, scheduler.found) == (0, 0)


def test_who_gives_way_leaves_the_step_also_where_that_is_not_enough():
    """B's blocks are half shared with A's, so that C, for whom B gives way, has not enough of them."""
    scheduler = make(blocks=8, max_batch_tokens=64, max_sequences=8)
    shared = list(range(10, 26))
    for name, prompt, priority in (("a", shared, 0), ("b", [*shared, 50], 0), ("c", list(range(100, 114)), -1)):
        params = SamplingParams(8, temperature=0.0)
        scheduler.add(GenerationRequest(name, tuple(prompt), params, priority=priority))
        chunks = scheduler.schedule()
        assert all(chunk.sequence.running and len(chunk.sequence.blocks) * 4 >= chunk.start + 1 for chunk in chunks)
        scheduler.complete(chunks, [Sampled(7) for chunk in chunks if chunk.sample])
    while len(scheduler):
        chunks = scheduler.schedule()
        assert chunks and all(chunk.sequence.running for chunk in chunks)
        scheduler.complete(chunks, [Sampled(7) for chunk in chunks if chunk.sample])
