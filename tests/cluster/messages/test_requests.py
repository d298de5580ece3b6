from __future__ import annotations

import dataclasses

import pytest

from isotherm.cluster.messages.requests import (
    Delta,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    SamplingParams,
    TokenLogprobs,
    merged_deltas,
)


def test_a_resumed_request_differs_in_what_was_generated_and_was_accepted():
    request = GenerationRequest("a", (1, 2), SamplingParams(9, temperature=0.5, seed=3))
    resumed = request.resumed((7, 8))
    assert resumed == GenerationRequest("a", (1, 2), SamplingParams(9, temperature=0.5, seed=3), (7, 8), accepted=True)
    assert (request.generated, request.accepted) == ((), False)
    assert request.resumed((), 3) == dataclasses.replace(request, scored=3, accepted=True)
    assert resumed.resumed(()) == dataclasses.replace(request, accepted=True)


@pytest.mark.parametrize("value", [SamplingParams(1), GenerationRequest("a", (1,), SamplingParams(1)), Delta("a", 0)])
def test_messages_are_frozen(value: object):
    field = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 2)


def test_parameters_cut_nothing_unless_asked():
    params = SamplingParams(5)
    assert (params.temperature, params.top_p, params.top_k, params.stop_token_ids, params.logprobs) == (
        1.0,
        1.0,
        0,
        (),
        None,
    )


def test_finish_reasons_are_what_openai_calls_them():
    assert (FinishReason.STOP.value, FinishReason.LENGTH.value) == ("stop", "length")


def test_merged_deltas_say_the_same():
    p, q = TokenLogprobs(-1.0), TokenLogprobs(-2.0)
    steps = [
        Delta("a", 0, (5,), logprobs=(p,), cached_tokens=3), Delta("b", 4, (9,)),
        Delta("a", 1, (6, 7), logprobs=(q, p)), Delta("b", 5, (), FinishReason.STOP),
        Delta("a", 3, (8,), FinishReason.LENGTH, (q,)),
    ]  # fmt: skip
    assert merged_deltas(steps) == [
        Delta("a", 0, (5, 6, 7, 8), FinishReason.LENGTH, (p, q, p, q), cached_tokens=3),
        Delta("b", 4, (9,), FinishReason.STOP)
    ]  # fmt: skip


def test_what_scores_a_prompt_comes_in_one_with_the_first_tokens():
    p, q = TokenLogprobs(-1.0, rank=1), TokenLogprobs(-2.0, rank=3)
    steps = [
        Delta("a", 0, prompt=PromptLogprobs(1, (p, q))), Delta("b", 0, (5,)),
        Delta("a", 0, prompt=PromptLogprobs(3, (q,))),
        Delta("a", 0, (9,), prompt=PromptLogprobs(4, (p,))), Delta("a", 1, (9,), FinishReason.LENGTH),
    ]  # fmt: skip
    assert merged_deltas(steps) == [
        Delta("a", 0, (9, 9), FinishReason.LENGTH, prompt=PromptLogprobs(1, (p, q, q, p))),
        Delta("b", 0, (5,)),
    ]


@pytest.mark.parametrize("after", [
    Delta("a", 0, finish_reason=FinishReason.MOVED), Delta("a", 1, finish_reason=FinishReason.ERROR, error="lost"),
    Delta("a", 2, (7,)), Delta("b", 1, (7,)),
])  # fmt: skip
def test_what_does_not_follow_stays_apart(after: Delta):
    assert merged_deltas([Delta("a", 0, (5,)), after]) == [Delta("a", 0, (5,)), after]
    # A later request of that name
    assert merged_deltas([Delta("a", 0, (5,), FinishReason.STOP), Delta("a", 1, (6,))])[1:] == [Delta("a", 1, (6,))]
