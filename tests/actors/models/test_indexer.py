"""DeepSeek-V3.2's sparse attention: which positions are chosen, and that nothing else is seen of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import make_family

from isotherm.actors.local import local_engine, run
from isotherm.actors.models.deepseek_v32 import DeepseekV32Model, sparse_rows
from isotherm.actors.models.indexer import Indexer
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import AttentionRows, Kernels, PrefillRows
from isotherm.kernels.reference import ReferenceKernels

HEADS, WIDTH, ROTARY, HIDDEN, RANK = 5, 12, 4, 16, 8


def indexer(topk: int, kernels: Kernels | None = None, seed: int = 0) -> Indexer:
    kernels = kernels or ReferenceKernels(torch.float32)
    g = torch.Generator().manual_seed(seed)

    def packed(rows: int, columns: int) -> Any:
        return kernels.pack_linear([PlainWeight(torch.randn(rows, columns, generator=g))])

    return Indexer(
        kernels, packed(HEADS * WIDTH, RANK), packed(WIDTH, HIDDEN), torch.ones(WIDTH), torch.zeros(WIDTH),
        packed(HEADS, HIDDEN), HEADS, ROTARY, topk,
    )  # fmt: skip


def chosen(topk: int, lengths: list[int], keys: torch.Tensor, kernels: Kernels | None = None) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    n = len(lengths)
    h, source = torch.randn(n, HIDDEN, generator=g), torch.randn(n, RANK, generator=g)
    cos, sin = torch.ones(n, ROTARY // 2), torch.zeros(n, ROTARY // 2)
    parts = indexer(topk, kernels).choose(h, source, cos, sin, torch.tensor(lengths), keys)
    return torch.cat([positions for _, positions in parts])


def test_scores_are_those_of_the_formula():
    """Σ_heads weight × ReLU(query · key) in float64, position by position."""
    keys = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1))
    one, g = indexer(7), torch.Generator().manual_seed(3)
    h, source = torch.randn(2, HIDDEN, generator=g), torch.randn(2, RANK, generator=g)
    query, weight = (source @ one.query.data.T).view(2, HEADS, WIDTH).double(), (h @ one.head_weight.data.T).double()
    # Without a rotation, the rotary dimensions still stand in pairs.
    order = [0, 2, 1, 3, *range(4, WIDTH)]
    scores = torch.einsum(
        "nh,nhl->nl", weight * HEADS**-0.5, (query[..., order] @ keys.double().T * WIDTH**-0.5).relu()
    )
    for row, length in enumerate((20, 30)):
        best = scores[row, :length].topk(7).indices.sort().values
        assert chosen(7, [20, 30], keys)[row].tolist() == best.tolist()


def test_the_earlier_of_equal_scores_wins():
    keys = torch.zeros(9, WIDTH)
    assert chosen(4, [9, 6], keys).tolist() == [[0, 1, 2, 3]] * 2
    keys = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1)).repeat(9, 1)
    assert chosen(4, [9, 6], keys).tolist() == [[0, 1, 2, 3]] * 2


def test_what_a_row_does_not_see_is_never_chosen():
    keys = torch.full((40, WIDTH), torch.nan)
    keys[:11] = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))
    assert chosen(10, [11], keys).max() < 11


@pytest.mark.parametrize("kernels", [ReferenceKernels, NativeKernels], ids=lambda backend: backend.name)
def test_a_rows_choice_does_not_depend_on_others(monkeypatch: pytest.MonkeyPatch, kernels: Any):
    keys = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    lengths = [60, 50, 31, 42, 60]

    def all_of_them() -> list[list[int]]:
        own = kernels(torch.bfloat16)
        g = torch.Generator().manual_seed(3)
        h, source = (torch.randn(5, width, generator=g).bfloat16() for width in (HIDDEN, RANK))
        cos, sin = torch.rand(5, ROTARY // 2, generator=g), torch.rand(5, ROTARY // 2, generator=g)
        parts = indexer(24, own).choose(h, source, cos, sin, torch.tensor(lengths), keys)
        return [row for _, positions in parts for row in positions.tolist()]

    together = all_of_them()
    monkeypatch.setattr("isotherm.actors.models.indexer.MOST_PRODUCTS", 1)  # a row at a time
    assert all_of_them() == together and len(together) == 5


def test_rows_beyond_are_found_by_sequence():
    rows = AttentionRows(
        torch.zeros(12, 1), torch.zeros(12, 1), torch.zeros(12, dtype=torch.int64), 4,
        torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32), torch.tensor([0, 2, 2, 1], dtype=torch.int32),
        torch.tensor([9, 30, 31, 10], dtype=torch.int32),
        (PrefillRows(4, 5, 7, torch.tensor([7])), PrefillRows(9, 3, 0, torch.tensor([8]))),
    )  # fmt: skip
    found = [(s.rows.tolist(), s.lengths.tolist(), s.longest, s.block_table.tolist()) for s in sparse_rows(rows, 10)]
    assert found == [([1, 2], [30, 31], 31, [5, 6]), ([7, 8], [11, 12], 12, [7])]


OVERRIDES = {"index_topk": 24, "index_n_heads": 9, "index_head_dim": 12, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_family(tmp_path_factory.mktemp("v32"), "deepseek_v32", OVERRIDES, 4))


def test_the_cache_has_a_key_beside_each_latent(checkpoint: Checkpoint):
    with WeightReader(checkpoint) as reader:
        model = load_model(checkpoint.config, ReferenceKernels(torch.bfloat16), reader, 64)
    assert isinstance(model, DeepseekV32Model)
    cache = model.new_cache(5, 16)
    assert [tuple(c.shape) for c in cache] == [(5, 16, 40)] * 3 + [(5, 16, 12)] * 3
    each = sum(c[0, 0].nbytes for c in cache)
    assert each == checkpoint.config.num_hidden_layers * checkpoint.config.cache_bytes(2, "auto")


def tokens(checkpoint: Checkpoint, budget: int, others: int, kept: KvCacheDtype = "auto") -> list[int]:
    scheduler = SchedulerConfig(16, 64, budget, 8, 128, prefix_cache=False)
    engine = local_engine(checkpoint, NativeKernels(torch.bfloat16), scheduler, kv_cache_dtype=kept)
    prompt = tuple(range(5, 65))
    requests = [GenerationRequest("r", prompt, SamplingParams(20, temperature=1.0, seed=5))]
    for i in range(others):
        requests.append(GenerationRequest(f"o{i}", prompt[i:50], SamplingParams(20, temperature=1.0, seed=i)))
    return [t for delta in run(engine, requests) if delta.request_id == "r" for t in delta.token_ids]


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_a_streams_bits_depend_on_it_alone(checkpoint: Checkpoint, kept: KvCacheDtype):
    """In bf16, across the point from which attention is sparse: whole, in chunks that cross it, and in company."""
    alone = tokens(checkpoint, 128, 0, kept)
    assert len(alone) == 20
    for budget, others in ((7, 0), (23, 0), (128, 3), (31, 3)):
        assert tokens(checkpoint, budget, others, kept) == alone


def test_within_index_topk_it_is_deepseek_v3(tmp_path: Path):
    """The same numbers without the indexer give the same tokens, as long as all positions would be chosen."""
    wide = {**OVERRIDES, "index_topk": 80}
    sparse = Checkpoint.open(make_family(tmp_path / "sparse", "deepseek_v32", wide, 4))
    plain = Checkpoint.open(make_family(tmp_path / "plain", "joyai_llm_flash", {"max_position_embeddings": 256}, 4))
    assert tokens(sparse, 128, 0) == tokens(plain, 128, 0)
