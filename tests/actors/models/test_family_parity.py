"""Every relative of DeepSeek-V3 against transformers' class of it, in float32 from dequantised weights: random configs
with the family's own traits, on both CPU kernels, whole, in chunks, from the cache, and preempted.

Kimi's and JoyAI's own modeling files are DeepSeek-V3's under another name; so their oracle is DeepseekV3ForCausalLM, as
it is transformers' own for K2.5's text model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from family_checkpoints import make_family, random_config
from parity import OUTPUT, TOLERANCE, Case, forward_all, gather, steps

from isotherm.actors.local import run
from isotherm.cluster.engine.sequence import Form
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

FAMILIES = ("kimi_k2", "kimi_k25", "moonlight", "glm4_moe_lite", "joyai_llm_flash", "deepseek_v32")
CONFIGS = int(os.environ.get("ISOTHERM_FAMILY_CONFIGS", "1"))  # of each family; `make families` takes 12
PROMPT = 70
ATTEMPTS = 60  # for weights with which no choice is close, and which float32 can compute with


@pytest.fixture(scope="module", params=[(family, n) for family in FAMILIES for n in range(CONFIGS)],
                ids=lambda pair: f"{pair[0]}-{pair[1]}")  # fmt: skip
def checkpoint_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, number = request.param
    overrides, options = random_config(family, number)
    for seed in range(ATTEMPTS):
        path = make_family(tmp_path_factory.mktemp(family), family, overrides, seed, **options)
        case = Case(path, seed, PROMPT, (29, 1))
        if not case.close_call and case.rounding < TOLERANCE / 3:
            return case
    raise AssertionError(f"each of {ATTEMPTS} seeds has a close choice, or logits that float32 cannot hold")


@pytest.fixture(scope="module", params=[ReferenceKernels, NativeKernels], ids=lambda backend: backend.name)
def case(request: pytest.FixtureRequest, checkpoint_case: Case) -> Case:
    checkpoint_case.kernels = request.param(torch.float32)
    return checkpoint_case


@pytest.mark.parametrize(
    "forms",
    [
        [(Form.PREFILL, 0, PROMPT)],
        [(Form.DECODE, 0, PROMPT)],
        [(Form.PREFILL, 0, 27), (Form.PREFILL, 27, 30), (Form.DECODE, 57, PROMPT - 57)],
    ],
    ids=["prefill", "decode", "both"],
)
def test_log_probabilities_at_every_position(case: Case, forms: Sequence[tuple[Form, int, int]]):
    torch.testing.assert_close(forward_all(case, forms), case.logprobs, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_in_company_chunked_and_cached(case: Case):
    engine = case.engine(budget=23, prefix_cache=True, groups=2)
    tokens = gather(run(engine, [case.other_requests()[0], case.request(), case.other_requests()[1]]))
    assert tokens == {"main": case.tokens, "other-0": case.other_tokens[0], "other-1": case.other_tokens[1]}
    again = list(run(engine, [case.request("again")]))
    assert gather(again)["again"] == case.tokens and len(case.tokens) == OUTPUT
    assert {delta.cached_tokens for delta in again} == {64}


def test_preempted_and_resumed(case: Case):
    """In the middle of the prompt, and among generated tokens."""
    engine = case.engine(budget=40)
    engine.scheduler.add(case.request())
    deltas = []
    for step, new in enumerate(steps(engine)):
        deltas += new
        if step in (0, 17):
            engine.scheduler.preempt("main")
    assert gather(deltas)["main"] == case.tokens and engine.scheduler.preemptions == 2
    resumed = run(case.engine(), [case.request().resumed(tuple(case.tokens[:29]))])
    assert gather(resumed, start=29)["main"] == case.tokens[29:]
