"""A row alone and the same row in company, to the bit, at DeepSeek-V3's own shapes: what the interpreter cannot show,
for a tensor core may add in another order in another tile. `make test-gpu` runs this."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from weight_cases import randn, stored

from isotherm.kernels.ops import Router
from isotherm.kernels.triton.backend import TritonKernels

BF16 = torch.bfloat16
KERNELS = TritonKernels(BF16, "cuda")
# Outputs and inputs: q_a, q_b of 16 heads, kv_a, o of 16 heads and an expert's down, its gate and up.
SHAPES = [(1536, 7168), (3072, 1536), (576, 7168), (7168, 2048), (4096, 7168)]
KINDS = ["bf16", "fp8", "int4", "int8"]
ROWS = [1, 2, 7, 16, 17, 32, 33, 64, 65, 127, 128, 129, 256, 300]
MOST = 320


def rows_of(width: int) -> torch.Tensor:
    return randn(MOST, width, seed=width, dtype=BF16).cuda()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int], kind: str) -> None:
    weight = stored(*shape, kind, 1)
    packed = KERNELS.pack_linear([weight])
    x = rows_of(shape[1])
    together = KERNELS.linear(x, packed, torch.float32)
    exact = x.double().cpu() @ weight.dequantise(torch.float32).double().T
    assert ((together.cpu() - exact).norm() / exact.norm()).item() < (1e-5 if kind == "bf16" else 2e-3)
    for count in ROWS:
        for first in {0, 3, MOST - count}:
            if first + count <= MOST:
                some = KERNELS.linear(x[first : first + count], packed, torch.float32)
                assert torch.equal(some, together[first : first + count]), (count, first)
    assert torch.equal(KERNELS.linear(x, packed, torch.float32), together)


@pytest.mark.parametrize("kind", KINDS)
def test_mlp_and_experts(kind: str) -> None:
    hidden, inner, held = 7168, 2048, 3
    weights = [[stored(*s, kind, 9 * e + i) for i, s in enumerate([(inner, hidden)] * 2 + [(hidden, inner)])]
               for e in range(held)]  # fmt: skip
    bank = KERNELS.expert_bank(held, hidden, inner)
    for slot, three in enumerate(weights):
        bank.load(slot, *three)
    gate_up, down = KERNELS.pack_linear(weights[0][:2]), KERNELS.pack_linear(weights[0][2:])
    x = rows_of(hidden)
    together = KERNELS.mlp(x, gate_up, down)
    for first, count in [(0, 1), (300, 1), (5, 17), (100, 64), (50, 200)]:
        assert torch.equal(KERNELS.mlp(x[first : first + count], gate_up, down), together[first : first + count])

    def experts(rows: dict[int, list[int]]) -> torch.Tensor:
        pairs = [r for some in rows.values() for r in some]
        offsets = torch.tensor([0, *(len(some) for some in rows.values())]).cumsum(0).int()
        return KERNELS.experts(
            x, bank, torch.tensor(pairs, dtype=torch.int32), torch.tensor([*rows], dtype=torch.int32), offsets
        )

    all_rows = experts({0: [*range(MOST)], 2: [*range(0, MOST, 3)], 1: [7]})
    for row in (0, 1, 63, 64, 200, MOST - 1):
        assert torch.equal(experts({0: [row]})[0], all_rows[row]), row
    assert torch.equal(experts({1: [7], 0: [*range(17)]})[:1], all_rows[-1:])
    assert torch.equal(experts({2: [0, 3, 6]}), all_rows[MOST : MOST + 3])


def test_route() -> None:
    router = Router(
        randn(256, 7168, seed=1, scale=0.01).cuda(), randn(256, seed=2, scale=0.01).cuda(), 8, 4, 8, True, 2.5
    )
    x = rows_of(7168)
    ids, weights = KERNELS.route(x, router)
    for first, count in [(0, 1), (300, 1), (5, 17), (100, 64), (50, 200)]:
        alone = KERNELS.route(x[first : first + count], router)
        assert torch.equal(alone[0], ids[first : first + count]) and torch.equal(
            alone[1], weights[first : first + count]
        )


@pytest.mark.parametrize("heads", [16, 128])
def test_decode_attention(heads: int) -> None:
    lengths = [4000, 1, 700, 64, 65, 9000, 2048, 33]
    counts = [-(-n // 64) for n in lengths]
    cache = randn(sum(counts), 64, 576, seed=1, dtype=BF16).cuda()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for s, ids in enumerate(torch.randperm(sum(counts)).int().split(counts)):
        tables[s, : len(ids)] = ids
    tables, q = tables.cuda(), randn(len(lengths), heads, 576, seed=2, dtype=BF16).cuda()
    order, length = (
        torch.arange(len(lengths), dtype=torch.int32).cuda(),
        torch.tensor(lengths, dtype=torch.int32).cuda(),
    )
    together = KERNELS.mla_decode(q[..., :512], q[..., 512:], cache, tables, order, length, 0.07)
    for t in range(len(lengths)):
        one = slice(t, t + 1)
        alone = KERNELS.mla_decode(q[one, :, :512], q[one, :, 512:], cache, tables[one], order[:1], length[one], 0.07)
        assert torch.equal(alone[0], together[t]), t
    entries = cache[tables[0, : counts[0]].long()].flatten(0, 1)[: lengths[0]].double()
    weights = ((q[0].double() @ entries.T) * 0.07).softmax(-1)
    exact = weights @ entries[:, :512]
    assert ((together[0].double() - exact).norm() / exact.norm()).item() < 1e-2


def test_prefill_attention_in_chunks() -> None:
    heads, length = 16, 1500
    kv_b = KERNELS.pack_linear([stored(heads * 256, 512, "fp8", 3)])
    cache = randn(24, 64, 576, seed=1, dtype=BF16).cuda()
    table = torch.randperm(24).int().cuda()
    q = randn(length, heads, 192, seed=2, dtype=BF16).cuda()
    whole = KERNELS.mla_prefill(q, cache, table, 0, kv_b, 128, 0.07)
    for cuts in ([0, 1, 64, 700, length], [0, 512, 1024, length], [0, 1499, length]):
        parts = [KERNELS.mla_prefill(q[a:b], cache, table, a, kv_b, 128, 0.07) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), cuts
