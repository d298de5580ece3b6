"""The promise that a row's bits don't depend on its company, of the Triton kernels in Triton's CPU interpreter
or on a GPU.

Not collected by itself: test_triton.py runs it with TRITON_INTERPRET=1, `make test-gpu` on a GPU.
What the interpreter cannot show, since it computes every tile's product alike, is whether a tensor core does:
kernels/triton/__init__.py says what is relied on.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from triton_cases import BF16, F32, KERNELS, Paged, pairs_of, randn, triton_kernels
from weight_cases import filled_banks, stored

from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.ops import Router
from isotherm.kernels.reference import ReferenceKernels
from isotherm.kernels.triton.attention import KV_SPLIT
from isotherm.kernels.triton.backend import TritonKernels


@pytest.fixture(params=[BF16, F32], ids=["bf16", "f32"])
def kernels(request: pytest.FixtureRequest) -> TritonKernels:
    return KERNELS[request.param]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("columns", [96, 321, 1100])
def test_linear_rows_alone_equal_rows_together(kernels: TritonKernels, kind: str, columns: int) -> None:
    """1100 inputs are summed in two parts: by programs of their own for few rows, by one for many."""
    packed = kernels.pack_linear([stored(n, columns, kind, n) for n in (100, 64)])
    assert packed.data.splits == (2 if columns == 1100 else 1)
    x = randn(140, columns, seed=1, dtype=kernels.dtype)
    together = kernels.linear(x, packed, F32)
    for first, rows in [(0, 1), (139, 1), (3, 2), (5, 16), (5, 17), (7, 33), (60, 65), (1, 128)]:
        assert torch.equal(kernels.linear(x[first : first + rows], packed, F32), together[first : first + rows]), (
            first,
            rows,
        )


def test_head_linear_mlp_route_and_norm_rows_alone_equal_rows_together(kernels: TritonKernels) -> None:
    weight = kernels.pack_heads([PlainWeight(w) for w in randn(3, 48, 40, seed=1)])
    x = randn(70, 3, 40, seed=2, dtype=kernels.dtype)
    assert torch.equal(
        torch.cat([kernels.head_linear(row, weight) for row in x[:9].split(1)]), kernels.head_linear(x, weight)[:9]
    )
    x = randn(70, 600, seed=3, dtype=kernels.dtype)
    router = Router(randn(64, 600, seed=11, scale=0.05), randn(64, seed=12), 8, 4, 6, True, 2.5)
    ids, weights = kernels.route(x, router)
    norm = kernels.rms_norm(x, randn(600, seed=8), 1e-6)
    for some in (slice(0, 1), slice(69, 70), slice(5, 40)):
        alone = kernels.route(x[some], router)
        assert torch.equal(alone[0], ids[some]) and torch.equal(alone[1], weights[some])
        assert torch.equal(kernels.rms_norm(x[some], randn(600, seed=8), 1e-6), norm[some])
    for kind in ("bf16", "fp8"):
        gate_up, down = (
            kernels.pack_linear([stored(64, 600, kind, i) for i in (0, 3)]),
            kernels.pack_linear([stored(600, 64, kind, 6)]),
        )
        together = kernels.mlp(x, gate_up, down)
        for some in (slice(0, 1), slice(69, 70), slice(4, 21), slice(5, 40)):
            assert torch.equal(kernels.mlp(x[some], gate_up, down), together[some])


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_expert_rows_alone_equal_rows_together(kernels: TritonKernels, kind: str) -> None:
    (bank,) = filled_banks([kernels], 5, 160, 64, kind)
    x = randn(80, 160, seed=3, dtype=kernels.dtype)
    run = {2: list(range(80)), 0: [4, 9], 3: [1], 1: list(range(3, 20))}
    together = kernels.experts(x, bank, *pairs_of(run)).split([len(rows) for rows in run.values()])
    for (expert, rows), outputs in zip(run.items(), together, strict=True):
        for place in {0, len(rows) // 2, len(rows) - 1}:
            alone = kernels.experts(x[rows[place]][None], bank, *pairs_of({expert: [0]}))
            assert torch.equal(alone[0], outputs[place]), (expert, place)
    # The slot that an expert lies in, and what was there before, don't matter.
    bank.load(
        3, *(stored(*shape, kind, 2 * 9 + seed) for shape, seed in (((64, 160), 0), ((64, 160), 3), ((160, 64), 6)))
    )
    assert torch.equal(kernels.experts(x, bank, *pairs_of({3: list(range(80))})), together[0])


def test_decode_rows_alone_equal_rows_together(kernels: TritonKernels) -> None:
    """Short rows among long ones are merged from splits, and alone finished in place. Tables, block sizes and the
    workspace change nothing."""
    lengths = [KV_SPLIT + 300, 40, 513, KV_SPLIT, 7, 2 * KV_SPLIT + 5]
    paged = Paged(kernels, lengths, 16, 64, 32)
    other = Paged(kernels, lengths, 64, 64, 32, seed=1)
    q = randn(len(lengths), 5, 96, seed=5, dtype=kernels.dtype)
    sequence, length = torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    together = kernels.mla_decode(q[..., :64], q[..., 64:], paged.cache, paged.tables, sequence, length, 0.1)
    cramped = triton_kernels(kernels.dtype)
    cramped.decode_workspace = 1 << 13  # two rows at once
    assert torch.equal(
        cramped.mla_decode(q[..., :64], q[..., 64:], paged.cache, paged.tables, sequence, length, 0.1), together
    )
    for t in range(len(lengths)):
        one = slice(t, t + 1)
        table = other.tables[one, : -(-lengths[t] // 64)]
        alone = kernels.mla_decode(q[one, :, :64], q[one, :, 64:], other.cache, table, sequence[:1], length[one], 0.1)
        assert torch.equal(alone[0], together[t]), t
    # Several rows of one sequence, as speculation verifies them, equal the same rows one by one.
    three = torch.tensor([KV_SPLIT - 1, KV_SPLIT, KV_SPLIT + 1], dtype=torch.int32)
    first = torch.zeros(3, dtype=torch.int32)
    several = kernels.mla_decode(q[:3, :, :64], q[:3, :, 64:], paged.cache, paged.tables, first, three, 0.1)
    for t in range(3):
        one = slice(t, t + 1)
        alone = kernels.mla_decode(
            q[one, :, :64], q[one, :, 64:], other.cache, other.tables, first[:1], three[one], 0.1
        )
        assert torch.equal(alone[0], several[t])


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_prefill_chunks_and_segments_equal_one_prefill(kernels: TritonKernels, kind: str) -> None:
    heads, latent, rotary, nope, value = 2, 64, 16, 24, 40
    length = 200
    paged = Paged(kernels, [length], 16, latent, rotary)
    stored_kv_b = stored(heads * (nope + value), latent, kind, 3)
    q = randn(length, heads, nope + rotary, seed=4, dtype=kernels.dtype)
    whole = kernels.mla_prefill(q, paged.cache, paged.tables[0], 0, kernels.pack_linear([stored_kv_b]), value, 0.2)
    segmented = triton_kernels(kernels.dtype)
    segmented.prefill_segment = 64
    for k, cuts in ((segmented, [0, length]), (kernels, [0, 1, 70, length]), (segmented, [0, 129, 192, length])):
        kv_b = k.pack_linear([stored_kv_b])
        for begin, end in pairwise(cuts):
            later = paged.cache.clone()
            if end < length:  # what follows must not matter, be it NaN
                slots = paged.tables[0][torch.arange(end, length) // 16].long() * 16 + torch.arange(end, length) % 16
                later.view(-1, latent + rotary)[slots] = torch.nan
            assert torch.equal(
                k.mla_prefill(q[begin:end], later, paged.tables[0], begin, kv_b, value, 0.2), whole[begin:end]
            ), (begin, end)


def test_sampled_rows_alone_equal_rows_together() -> None:
    logits = randn(5, 20_000, seed=14, scale=3)
    parameters = (torch.tensor([0, 1, 0.7, 1.5, 1.0]).double(), torch.tensor([1, 1, 0.9, 0.5, 1]).double(),
                  torch.tensor([0, 0, 0, 50, 7]), torch.arange(5), torch.arange(5) * 100)  # fmt: skip
    together = KERNELS[F32].sample(logits, *parameters)
    assert torch.equal(together, ReferenceKernels(F32).sample(logits, *parameters))
    for t in range(5):
        one = slice(t, t + 1)
        assert torch.equal(KERNELS[F32].sample(logits[one], *(p[one] for p in parameters)), together[one])
