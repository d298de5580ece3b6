"""Logits processors: what each does to a row, and that it does so to its own row alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotherm.actors.attention import prompt_scores, sampling
from isotherm.actors.attention.sampling import (
    Row,
    Sampler,
    TokenCounts,
    ban,
    bias,
    cut_unlikely,
    end_thought,
    go_on,
    penalise,
    token_logprobs,
)
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.kernels.reference import ReferenceKernels, candidates

VOCABULARY = 40
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=20)
# Values of every parameter that a processor reads: a new one belongs here.
PENALTIES = st.fixed_dictionaries(
    {
        "logit_bias": st.sampled_from([(), ((3, 2.0), (5, -100.0))]),
        "min_tokens": st.sampled_from([0, 12]),
        "stop_token_ids": st.just((7, 9)),
        "bad_words": st.sampled_from([(), ((4,), (1, 2), (2, 2, 6))]),
        "thought_begin": st.sampled_from([(), (8,)]),
        "thought_end": st.sampled_from([(), (8,), (11, 12)]),
        "max_thinking_tokens": st.sampled_from([None, 0, 5]),
        "processed_logprobs": st.booleans(),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([-1.5, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.4, 0.0, 2.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "temperature": st.sampled_from([0.0, 0.5, 2.0]),
    }
)


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def row(params: SamplingParams, prompt: list[int], output: list[int]) -> Row:
    counts = TokenCounts(prompt)
    counts.take(output)
    return Row(params, output, lambda: counts)


def chunk(name: str, prompt: list[int], output: list[int], draft: tuple[int, ...] = (), **params) -> Chunk:
    request = GenerationRequest(name, tuple(prompt), SamplingParams(50, **params))
    sequence = ScheduledSequence(request, 0, [*prompt, *output])
    start = len(sequence.tokens) - 1
    return Chunk(sequence, start, 1 + len(draft), Form.DECODE, sample=True, draft=draft)


@given(TOKENS, TOKENS, PENALTIES, st.integers(0, 99))
def test_penalties_are_those_of_the_formula(prompt, output, asked, seed):
    """Token by token, in doubles."""
    logits, params = logits_of(seed), SamplingParams(50, **asked)
    got, times = logits.clone(), Counter(output)
    penalise(row(params, prompt, output), got)
    for token in range(VOCABULARY):
        value = float(logits[token])
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * times[token] + params.presence_penalty * (token in output)
        assert float(got[token]) == pytest.approx(value, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_min_p_leaves_what_is_likely_enough_at_the_temperature(min_p, temperature):
    logits = logits_of(3)
    got = logits.clone()
    cut_unlikely(row(SamplingParams(5, temperature=temperature, min_p=min_p), [], []), got)
    probabilities = (logits.double() / temperature).softmax(-1)
    left = probabilities >= min_p * probabilities.max() * (1 - 1e-6)
    assert torch.equal(got.isfinite(), left) and 0 < left.sum() < VOCABULARY
    assert torch.equal(got[left], logits[left]) and (got[~left] == -math.inf).all()


def test_bias_is_added_to_its_tokens_alone():
    logits = logits_of(1)
    got = logits.clone()
    bias(row(SamplingParams(5, logit_bias=((3, 2.5), (7, -100.0))), [], []), got)
    assert got[3] == logits[3] + 2.5 and got[7] == logits[7] - 100
    assert torch.equal(got[[*range(3), *range(8, VOCABULARY)]], logits[[*range(3), *range(8, VOCABULARY)]])


@pytest.mark.parametrize("output", [0, 1, 2, 3])
def test_no_token_that_ends_the_stream_is_drawn_too_early(output):
    logits = logits_of(1)
    got = logits.clone()
    go_on(row(SamplingParams(9, min_tokens=2, stop_token_ids=(4, 9)), [1], [5] * output), got)
    assert (got[[4, 9]] == -math.inf).tolist() == [output < 2] * 2
    assert torch.equal(got.isfinite(), got == logits)


WORDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.integers(0, 3), max_size=8), WORDS)
def test_no_bad_word_is_completed(output, words):
    """Whatever is drawn, and only what would complete one is kept from it."""
    logits = logits_of(1)
    got = logits.clone()
    ban(row(SamplingParams(9, bad_words=words), [0, 1, 2, 3], output), got)
    for token in range(VOCABULARY):
        after = [*output, token]
        completed = any(after[-len(word) :] == list(word) for word in words)
        assert float(got[token]) == (-math.inf if completed else float(logits[token]))


def through_end_thought(written, **params):
    """The output of a model that would write this."""
    output: list[int] = []
    for token in written:
        logits = torch.zeros(VOCABULARY)
        end_thought(row(SamplingParams(50, **params), [1], output), logits)
        allowed = logits.isfinite().nonzero().flatten().tolist()
        assert len(allowed) in (1, VOCABULARY)
        output.append(allowed[0] if len(allowed) == 1 else token)
    return output


@pytest.mark.parametrize(
    ("written", "output"),
    [
        ([5, 5, 5, 5, 5], [5, 5, 5, 5, 5]),  # no thought
        ([8, 5, 5, 5, 5], [8, 5, 5, 9, 5]),
        ([7, 7, 8, 5, 5, 5, 5], [7, 7, 8, 5, 5, 9, 5]),  # after white space
        ([5, 5, 5, 8, 5, 5, 5], [5, 5, 5, 8, 5, 5, 5]),  # in an answer
        ([8, 9, 5, 5, 5], [8, 9, 5, 5, 5]),
    ],
)
def test_only_a_thought_that_was_begun_is_ended(written, output):
    assert through_end_thought(written, thought_begin=(8,), thought_end=(9,), max_thinking_tokens=2) == output


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
    st.integers(0, 6),
)
def test_a_thought_ends_when_it_has_its_tokens(written, end, most):
    """What the model would write comes through `end_thought`, token by token."""
    output = through_end_thought(written, thought_end=end, max_thinking_tokens=most)
    begun_by_itself = through_end_thought(
        [3, 4, *written], thought_begin=(3, 4), thought_end=end, max_thinking_tokens=most
    )
    assert begun_by_itself == [3, 4, *output]

    def ends(tokens: list[int]) -> list[int]:
        return [i for i in range(len(tokens)) if tuple(tokens[i : i + len(end)]) == end]

    assert output[:most] == written[:most]
    if ends(output[:most]):
        assert output == written
    elif len(written) >= most + len(end):
        # One that had begun by itself is not begun again.
        (first, *_), begun = ends(output), output[:most]
        assert most - len(end) < first <= most
        assert output[first + len(end) :] == written[first + len(end) :] and begun == written[:most]


def test_an_end_of_one_token_is_forced_once():
    params = {"thought_end": (8,), "max_thinking_tokens": 2, "temperature": 0.0, "bad_words": ((8,),)}
    likely = torch.zeros(1, VOCABULARY)
    likely[0, 5] = 9.0
    sampler = Sampler(ReferenceKernels(torch.float32))
    outputs = [[], [5], [5, 5], [5, 5, 8], [8, 5]]
    drawn = [sampler.sample([chunk("a", [1], output, **params)], likely.clone())[0].token_id for output in outputs]
    assert drawn == [5, 5, 8, 5, 5]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_processed_logprobs_are_of_what_is_drawn_from(temperature):
    asked = {"temperature": temperature, "top_k": 4, "top_p": 0.9, "logit_bias": ((3, 5.0),), "bad_words": ((5,),)}
    logits = logits_of(2)
    kernels = ReferenceKernels(torch.float32)
    (got,) = Sampler(kernels).sample(
        [chunk("a", [1], [2], **asked, logprobs=6, processed_logprobs=True)], logits[None].clone()
    )
    logits[3] += 5.0
    logits[5] = -math.inf
    if temperature:
        ids, left = candidates(logits / temperature, 0.9, 4)
        logits = torch.full_like(logits, -math.inf)
        logits[ids] = left
    expected = logits.log_softmax(-1)
    assert got.logprobs.chosen == pytest.approx(float(expected[got.token_id]), abs=1e-5)
    kept = [value for _, value in got.logprobs.top if value > -math.inf]
    assert kept == pytest.approx(sorted(expected[expected.isfinite()].tolist(), reverse=True)[:6], abs=1e-5)
    assert math.exp(kept[0]) + sum(map(math.exp, kept[1:])) == pytest.approx(1, abs=1e-4) or not temperature


def test_processors_act_in_the_order_that_the_docs_name():
    names = [act.__name__ for _, act in sampling.PROCESSORS]
    assert names == ["penalise", "bias", "ban", "go_on", "end_thought", "cut_unlikely"]


@given(st.lists(st.tuples(TOKENS, TOKENS, PENALTIES, st.integers(0, 9)), min_size=1, max_size=5), st.booleans())
def test_a_row_does_not_depend_on_the_others(cases, logprobs):
    chunks = [
        chunk(str(i), [1, *prompt], output, **asked, seed=seed, logprobs=2 if logprobs else None)
        for i, (prompt, output, asked, seed) in enumerate(cases)
    ]
    logits = torch.stack([logits_of(seed) for *_, seed in cases])
    kernels = ReferenceKernels(torch.float32)
    together = Sampler(kernels).sample(chunks, logits.clone())
    assert together == [
        sampled
        for one, row_V in zip(chunks, logits, strict=True)
        for sampled in Sampler(kernels).sample([one], row_V[None].clone())
    ]
    if logprobs:  # of the model's own distribution, whatever the processors make of it, unless it is that one's
        for (_, _, asked, _), sampled, row_V in zip(cases, together, logits, strict=True):
            own = token_logprobs(row_V, sampled.token_id, 2)
            assert sampled.logprobs == own or asked["processed_logprobs"]


def test_a_row_that_needs_no_processor_pays_for_none(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("nobody has asked for it")

    processors = tuple((needs, fail) for needs, _ in sampling.PROCESSORS)
    monkeypatch.setattr(sampling, "PROCESSORS", processors)
    plain = chunk("a", [1, 2], [3], temperature=1.0)
    plain_greedy = chunk("b", [1, 2], [3], temperature=0.0, min_p=0.5)  # the likeliest stays in any case
    Sampler(ReferenceKernels(torch.float32)).sample([plain, plain_greedy], torch.stack([logits_of(1)] * 2))


@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4), TOKENS)
def test_counts_grow_with_the_output_and_forget_drafts(prompt, steps, draft):
    counts, output = TokenCounts(prompt), []
    for step in steps:
        counts.with_draft(draft)
        output += step
        counts.take(output)
    drafted = counts.with_draft(draft)
    for found, expected in ((counts, output), (drafted, [*output, *draft])):
        times = dict(zip(found.ids.tolist(), found.times.tolist(), strict=True))
        assert times == {token: expected.count(token) for token in {*prompt, *expected}}


def test_counts_have_room_for_any_number_of_tokens():
    counts = TokenCounts(range(60))
    counts.take(range(300))
    assert counts.ids.tolist() == list(range(300)) and counts.times.tolist() == [1] * 300


@pytest.mark.parametrize("thinks", [None, 2, 3])
def test_rows_of_drafts_are_sampled_as_the_tokens_would_be_one_by_one(thinks):
    """Penalties count drafts before them, bad words and thoughts end in them; noise is drawn by the index that the
    token will have."""
    asked = {
        "temperature": 2.0, "frequency_penalty": 2.0, "seed": 5, "bad_words": ((7, 7, 9, 3), (9, 4)),
        "thought_end": (20, 21), "max_thinking_tokens": thinks,
    }  # fmt: skip
    logits = torch.stack([logits_of(i) for i in range(3)])
    sampler = Sampler(ReferenceKernels(torch.float32))
    drafted = sampler.sample([chunk("a", [1, 2], [7], draft=(7, 9), **asked)], logits.clone())
    one_by_one = [
        sampler.sample([chunk("a", [1, 2], [7, 7, 9][: i + 1], **asked)], logits[i : i + 1].clone())[0]
        for i in range(3)
    ]
    assert drafted == one_by_one


def test_every_parameter_is_taken_by_somebody():
    """A field of SamplingParams that neither this room nor the scheduler reads would be one without effect."""
    import inspect

    from isotherm.cluster.engine import drafts, policy, scheduler, speculation

    source = "".join(map(inspect.getsource, (sampling, prompt_scores, scheduler, policy, drafts, speculation)))
    assert [f.name for f in dataclasses.fields(SamplingParams) if f".{f.name}" not in source] == []


@pytest.mark.parametrize("params", [SamplingParams(5, temperature=0.0), SamplingParams(5, logprobs=2, min_p=0.1)])
def test_a_row_without_a_number_is_its_requests_error(params):
    """It was token 0 at every step, to the end of the output."""
    chunks = [
        Chunk(ScheduledSequence(GenerationRequest(name, (1, 2), params), i, [1, 2]), 0, 2, Form.PREFILL, sample=True)
        for i, name in enumerate("ab")
    ]
    logits = torch.stack([torch.full((VOCABULARY,), math.nan), logits_of(1)])
    broken, sound = Sampler(ReferenceKernels(torch.float32)).sample(chunks, logits)
    assert broken.token_id == -1 and broken.error == sampling.NO_NUMBERS
    assert sound.token_id >= 0 and not sound.error


def test_token_logprobs_are_of_the_whole_distribution():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    result = token_logprobs(logits, 0, 2)
    total = logits.exp().sum().log().item()
    assert result.chosen == pytest.approx(0.0 - total, abs=1e-6)
    assert [i for i, _ in result.top] == [1, 2]
    assert [v for _, v in result.top] == pytest.approx([2.0 - total, 1.0 - total], abs=1e-6)
