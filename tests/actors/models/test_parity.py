"""The engine against transformers' DeepseekV3ForCausalLM in float32, over configs that together cover every
architecture switch.

Every case's prompt and seed were chosen so that no choice of a token or an expert is close (see `Case.__init__`): so
greedy tokens must be identical, whatever order sums are taken in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from hf_oracle import Oracle

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine, run
from isotherm.actors.models.step_batch import build_batch
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import Placement
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

PROMPT, OUTPUT = 200, 48
BLOCK_SIZE = 16
TOLERANCE = 1e-4  # of log-probabilities
TOKEN_MARGIN, ROUTER_MARGIN = 5e-3, 2e-5  # tens of times what float32 rounding was seen to do

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


class Case:
    """One checkpoint with what the oracle says about it."""

    def __init__(self, spec: Spec, path: Path):
        make_checkpoint(path, spec.overrides, spec.seed, **spec.options)
        self.checkpoint = Checkpoint.open(path)
        self.config = self.checkpoint.config
        self.kernels: Kernels = ReferenceKernels(torch.float32)
        generator = torch.Generator().manual_seed(1000 + spec.seed)
        self.prompt = tuple(torch.randint(2, self.config.vocab_size, (PROMPT,), generator=generator).tolist())
        self.others = [
            tuple(torch.randint(2, self.config.vocab_size, (n,), generator=generator).tolist()) for n in (61, 1, 96)
        ]
        oracle = Oracle(path)
        self.logprobs = oracle.logprobs(self.prompt)
        self.tokens, self.rows, margin = oracle.greedy(self.prompt, OUTPUT)
        self.other_tokens = []
        for prompt in self.others:
            tokens, _, other_margin = oracle.greedy(prompt, OUTPUT)
            self.other_tokens.append(tokens)
            margin = min(margin, other_margin)
        self.margins = margin, oracle.router_margin
        assert margin > TOKEN_MARGIN, f"a token was chosen by a margin of only {margin:g}; take another seed"
        assert oracle.router_margin > ROUTER_MARGIN, (
            f"an expert was chosen by a margin of only {oracle.router_margin:g}; take another seed"
        )

    def engine(
        self,
        *,
        blocks: int = 64,
        budget: int = 256,
        prefix_cache: bool = False,
        groups: int = 1,
        placement: Placement | None = None,
    ) -> Engine:
        """With a cache full of NaN, so that whatever is read before it was written shows."""
        config = SchedulerConfig(
            BLOCK_SIZE, blocks, budget, max_sequences=8, max_model_len=PROMPT + OUTPUT + 8, prefix_cache=prefix_cache
        )
        engine = local_engine(self.checkpoint, self.kernels, config, groups, placement)
        for layer in engine.cache:
            layer.fill_(torch.nan)
        return engine

    def request(self, name: str = "main", prompt: tuple[int, ...] | None = None, **fields: Any) -> GenerationRequest:
        return GenerationRequest(name, prompt or self.prompt, SamplingParams(OUTPUT, temperature=0.0), **fields)

    def other_requests(self) -> list[GenerationRequest]:
        return [self.request(f"other-{i}", prompt) for i, prompt in enumerate(self.others)]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def checkpoint_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=[ReferenceKernels, NativeKernels], ids=lambda backend: backend.name)
def case(request: pytest.FixtureRequest, checkpoint_case: Case) -> Case:
    checkpoint_case.kernels = request.param(torch.float32)
    return checkpoint_case


def gather(deltas: Iterable[Delta], start: int = 0) -> dict[str, list[int]]:
    """Tokens by request; checks that deltas follow on each other from `start` and that only the last one finishes."""
    tokens: dict[str, list[int]] = {}
    finished = set()
    for delta in deltas:
        have = tokens.setdefault(delta.request_id, [])
        assert delta.start == start + len(have)
        assert delta.request_id not in finished
        have += delta.token_ids
        if delta.finish_reason is not None:
            assert delta.finish_reason is FinishReason.LENGTH
            finished.add(delta.request_id)
    assert finished == set(tokens)
    return tokens


def steps(engine: Engine) -> Iterator[list[Delta]]:
    while len(engine.scheduler):
        yield engine.step()


def forward_all(case: Case, forms: Sequence[tuple[Form, int, int]]) -> torch.Tensor:
    """Log-probabilities [PROMPT, V] at every position of the prompt, computed by AttentionModel.forward in the given
    (form, start, count)s."""
    engine = case.engine()
    sequence = ScheduledSequence(
        case.request(), 0, list(case.prompt), blocks=list(range(17, 17 + -(-PROMPT // BLOCK_SIZE)))
    )
    out = []
    for form, start, count in forms:
        batch = build_batch(
            [Chunk(sequence, start, count, form, sample=False)], BLOCK_SIZE, engine.model.cos, engine.model.sin
        )
        x = engine.model.forward(batch, engine.cache, engine.experts)
        out.append(engine.model.logits(x).log_softmax(-1))
    return torch.cat(out)


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
