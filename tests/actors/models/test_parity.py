"""The engine against transformers' DeepseekV3ForCausalLM in float32, over configs that together cover every
architecture switch.

Every case's prompt and seed were chosen so that no choice of a token or an expert is close (see `Case.close_call`): so
greedy tokens must be identical, whatever order sums are taken in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from parity import BLOCK_SIZE, OUTPUT, PROMPT, TOLERANCE, Case, forward_all, gather, steps

from isotherm.actors.local import run
from isotherm.cluster.engine.sequence import Form
from isotherm.cluster.messages.requests import SamplingParams
from isotherm.cluster.placement.table import Placement
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

YARN = {"factor": 8, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


@dataclass(frozen=True)
class Spec:
    name: str
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of make_checkpoint


SPECS = [
    Spec("base", 11, options={"shards": 3}),
    Spec("no-q-lora", 7, {"q_lora_rank": None}, {"dtype": "float32"}),
    Spec("one-group", 22, {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
         {"dtype": "float16"}),
    Spec("all-moe", 1, {"first_k_dense_replace": 0, "norm_topk_prob": False, "rms_norm_eps": 1e-2}),
    Spec("two-dense", 3, {"first_k_dense_replace": 2, "num_hidden_layers": 4, "n_shared_experts": 0}),
    Spec("all-dense", 4, {"first_k_dense_replace": 3}, {"dtype": "float16"}),
    Spec("every-second-moe", 2, {"moe_layer_freq": 2, "num_hidden_layers": 5}),
    Spec("every-second-moe-from-0", 4, {"moe_layer_freq": 2, "first_k_dense_replace": 0, "n_shared_experts": 0},
         {"dtype": "float32"}),
    Spec("tied", 0, {"tie_word_embeddings": True, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    Spec("attention-bias", 3, {"attention_bias": True}),
    Spec("attention-bias-no-q-lora", 0, {"attention_bias": True, "q_lora_rank": None}, {"rope_style": "new"}),
    Spec("yarn-equal", 0, {"max_position_embeddings": 512}, {"rope": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    Spec("yarn-unequal", 1, {"n_group": 2, "topk_group": 1, "max_position_embeddings": 512},
         {"rope": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6}, "rope_style": "new"}),
    Spec("yarn-no-all-dim", 4, {"v_head_dim": 10, "max_position_embeddings": 512},
         {"rope": YARN | {"mscale": 0.8, "mscale_all_dim": 0}}),
    Spec("yarn-plain", 4, {"v_head_dim": 14, "max_position_embeddings": 256},
         {"rope": {"factor": 4, "original_max_position_embeddings": 64, "truncate": False}, "rope_style": "new"}),
    Spec("one-head", 4, {"num_attention_heads": 1, "num_key_value_heads": 1, "num_experts_per_tok": 6},
         {"dtype": "float32"}),
    Spec("top-1", 2, {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}, {"mtp": True}),
    Spec(
        "fp8-ragged",
        4,
        {"hidden_size": 136, "intermediate_size": 150, "moe_intermediate_size": 70, "n_shared_experts": 2,
         "q_lora_rank": 40, "kv_lora_rank": 130, "qk_nope_head_dim": 30, "v_head_dim": 34, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512},
        {"fp8": True, "mtp": True, "shards": 2, "rope": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    Spec(
        "fp8-no-q-lora",
        14,
        {"hidden_size": 130, "q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0,
         "num_hidden_layers": 2, "moe_intermediate_size": 129},
        {"fp8": True, "dtype": "float16", "rope_style": "new"},
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def checkpoint_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    spec = request.param
    path = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), spec.overrides, spec.seed, **spec.options)
    case = Case(path, spec.seed)
    assert not case.close_call, f"{case.close_call}; take another seed"
    return case


@pytest.fixture(scope="module", params=[ReferenceKernels, NativeKernels], ids=lambda backend: backend.name)
def case(request: pytest.FixtureRequest, checkpoint_case: Case) -> Case:
    checkpoint_case.kernels = request.param(torch.float32)
    return checkpoint_case


@pytest.mark.parametrize(
    "forms",
    [
        [(Form.PREFILL, 0, PROMPT)],
        [(Form.DECODE, 0, PROMPT)],
        [(Form.PREFILL, 0, 77), (Form.PREFILL, 77, 50), (Form.DECODE, 127, PROMPT - 127)],
    ],
    ids=["prefill", "decode", "both"],
)
def test_log_probabilities_at_every_position(case: Case, forms: list[tuple[Form, int, int]]):
    torch.testing.assert_close(forward_all(case, forms), case.logprobs, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_and_their_distributions(case: Case):
    vocabulary = case.config.vocab_size
    request = dataclasses.replace(case.request(), params=SamplingParams(OUTPUT, temperature=0.0, logprobs=vocabulary))
    deltas = list(run(case.engine(), [request]))
    assert gather(deltas)["main"] == case.tokens
    for delta, expected in zip(deltas, case.rows, strict=True):
        (logprobs,) = delta.logprobs
        ids, values = zip(*logprobs.top, strict=True)
        assert sorted(ids) == list(range(vocabulary)) and list(values) == sorted(values, reverse=True)
        torch.testing.assert_close(torch.tensor(values), expected[list(ids)], rtol=0, atol=TOLERANCE)
        assert logprobs.chosen == pytest.approx(float(expected[delta.token_ids[0]]), abs=TOLERANCE)


def test_chunked_prefill(case: Case):
    engine = case.engine(budget=7)
    assert gather(run(engine, [case.request()]))["main"] == case.tokens
    assert engine.steps == -(-PROMPT // 7) + OUTPUT - 1


def test_prefix_cache_hit(case: Case):
    engine = case.engine(prefix_cache=True)
    first = list(run(engine, [case.request("first")]))
    assert {d.cached_tokens for d in first} == {0}
    # The whole prompt again, and a prompt that shares only its first blocks: both beside a request that shares nothing.
    half = case.prompt[:100]
    expected_half = gather(run(case.engine(), [case.request("half", half)]))["half"]
    deltas = list(run(engine, [case.request("again"), case.request("half", half), *case.other_requests()]))
    tokens = gather(deltas)
    assert tokens["again"] == case.tokens
    assert tokens["half"] == expected_half
    assert [tokens[f"other-{i}"] for i in range(3)] == case.other_tokens
    cached = {d.request_id: d.cached_tokens for d in deltas}
    assert cached == {
        "again": (PROMPT - 1) // BLOCK_SIZE * BLOCK_SIZE,
        "half": 96,
        "other-0": 0,
        "other-1": 0,
        "other-2": 0,
    }


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-cache", "cache"])
def test_forced_preemption(case: Case, prefix_cache: bool):
    """In the middle of the prompt, right after it, and among generated tokens; each time the cache's content is lost or
    found again."""
    engine = case.engine(budget=90, prefix_cache=prefix_cache)
    engine.scheduler.add(case.request())
    deltas = []
    for step, new in enumerate(steps(engine)):
        deltas += new
        if step in (1, 5, 26):
            engine.scheduler.preempt("main")
    assert gather(deltas)["main"] == case.tokens
    assert engine.scheduler.preemptions == 3


def test_cache_too_small_for_two(case: Case):
    blocks = -(-(PROMPT + OUTPUT + 8) // BLOCK_SIZE) + 2
    engine = case.engine(blocks=blocks)
    tokens = gather(run(engine, [case.other_requests()[0], case.request()]))
    assert engine.scheduler.preemptions > 0
    assert tokens == {"main": case.tokens, "other-0": case.other_tokens[0]}
    assert engine.scheduler.blocks.used == 0


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-cache", "cache"])
def test_resumed_request(case: Case, prefix_cache: bool):
    engine = case.engine(prefix_cache=prefix_cache, budget=150)
    if prefix_cache:
        gather(run(engine, [case.request("before")]))
    deltas = list(run(engine, [case.request().resumed(tuple(case.tokens[:29]))]))
    assert gather(deltas, start=29)["main"] == case.tokens[29:]
    assert all((d.cached_tokens > 0) == prefix_cache for d in deltas)


def three_groups_with_copies(case: Case) -> Placement:
    """One to three copies of each expert, over three groups of different sizes."""
    names = ("a", "b", "c")
    row = tuple(names[e % 3 :][: 1 + e % 3] if e % 4 else names for e in range(case.config.n_routed_experts))
    layers = case.config.moe_layers
    return Placement(5, layers, tuple(row if i % 2 else row[::-1] for i in range(len(layers))))


@pytest.mark.parametrize("experts", ["one-group", "three-groups", "copies"])
def test_several_requests_batched(case: Case, experts: str):
    engine = {
        "one-group": lambda: case.engine(budget=120),
        "three-groups": lambda: case.engine(groups=3),
        "copies": lambda: case.engine(placement=three_groups_with_copies(case)),
    }[experts]()
    requests = case.other_requests()
    tokens = gather(run(engine, [requests[0], case.request(), *requests[1:]]))
    assert tokens["main"] == case.tokens
    assert [tokens[f"other-{i}"] for i in range(3)] == case.other_tokens
    assert engine.steps < 2 * OUTPUT  # they did share steps
