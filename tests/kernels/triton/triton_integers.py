"""Weights of grouped integers in the Triton kernels, in Triton's CPU interpreter or on a GPU: against the numbers that
they stand for, and a row alone against the same row in company.

Not collected by itself: test_triton.py runs it with TRITON_INTERPRET=1, `make test-gpu` on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from triton_cases import BF16, F32, KERNELS, close, pairs_of, randn
from weight_cases import INTEGERS, filled_banks, stored

from isotherm.kernels.formats.grouped import Int4Weight, Int8Weight, pack_nibbles
from isotherm.kernels.formats.registry import stored_weight
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.reference import ReferenceKernels
from isotherm.kernels.triton.backend import TritonKernels

# Published layouts: groups of 32 without zero points, of 128 with and without; and what else is computed with.
GROUPED = [(32, False), (64, True), (128, False), (128, True)]


@pytest.fixture(params=[BF16, F32], ids=["bf16", "f32"])
def kernels(request: pytest.FixtureRequest) -> TritonKernels:
    return KERNELS[request.param]


def whole(rows: int, inputs: int, group: int, zeros: bool, seed: int) -> Int4Weight:
    """Scales are powers of two, so that products with small integers can be added in any order without rounding."""
    draw = torch.Generator().manual_seed(seed)
    groups = (rows, -(-inputs // group))
    codes, points = (torch.randint(0, 16, shape, generator=draw).to(torch.uint8) for shape in ((rows, inputs), groups))
    scales = 2.0 ** torch.randint(-3, 4, groups, generator=draw)
    return Int4Weight(pack_nibbles(codes), scales, points if zeros else None, group, inputs)


def whole_int8(rows: int, inputs: int, seed: int) -> Int8Weight:
    draw = torch.Generator().manual_seed(seed)
    scales = 2.0 ** torch.randint(-3, 4, (rows, -(-inputs // 32)), generator=draw)
    return Int8Weight(torch.randint(-127, 128, (rows, inputs), generator=draw).to(torch.int8), scales)


def whole_rows(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-8, 9, (rows, inputs), generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("group, zeros", GROUPED)
@pytest.mark.parametrize("rows, inputs", [(1, 96), (17, 200), (65, 128), (130, 1100)])
def test_every_code_group_and_zero_point_to_the_bit(
    kernels: TritonKernels, rows: int, inputs: int, group: int, zeros: bool
) -> None:
    """Sums that no order of adding can change are those of plain torch with the dequantised weights. 1100 inputs are
    summed in two parts."""
    weights: list[StoredWeight] = [whole(n, inputs, group, zeros, n) for n in (33, 7)]
    x = whole_rows(rows, inputs, kernels.dtype)
    packed = kernels.pack_linear(weights)
    assert packed.data.form.data == torch.uint8 and packed.data.group == group
    assert torch.equal(kernels.linear(x, packed, F32), x.float() @ torch.cat([w.dequantise(F32) for w in weights]).T)


def test_int8_to_the_bit(kernels: TritonKernels) -> None:
    weight, x = whole_int8(40, 200, 1), whole_rows(18, 200, kernels.dtype)
    packed = kernels.pack_linear([weight])
    assert packed.data.form.data == torch.int8 and packed.nbytes < 1.2 * 128 * 256
    assert torch.equal(kernels.linear(x, packed, F32), x.float() @ weight.dequantise(F32).T)


def test_as_quantisers_publish_them(kernels: TritonKernels) -> None:
    """Through the registry of formats: what compressed-tensors and GPTQ pack."""
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (40, 32), generator=draw).to(torch.int32)  # [N, K / 8]
    scale = randn(40, 8, seed=1, dtype=BF16, scale=0.05)
    packed = {"packed": words, "scale": scale, "shape": torch.tensor([40, 256])}
    gptq = {"packed": words.T.contiguous(), "scale": randn(2, 40, seed=2, dtype=torch.float16, scale=0.05),
            "zero": torch.randint(-(2**31), 2**31, (2, 5), generator=draw).to(torch.int32)}  # fmt: skip
    x = randn(3, 256, seed=4, dtype=kernels.dtype)
    for weight, form in (
        (stored_weight("pack-quantized", packed, {"group_size": 32}), (BF16, 32, False)),
        (stored_weight("gptq", gptq, {"group_size": 128, "zero_offset": 1}), (torch.float16, 128, True)),
    ):
        linear = kernels.pack_linear([weight])
        assert (linear.data.form.scale, linear.data.form.group, linear.data.form.zeros) == form
        close(kernels.linear(x, linear, F32), x.float() @ weight.dequantise(F32).T, F32)


@pytest.mark.parametrize("kind", INTEGERS)
def test_memory_mlp_and_rows_alone(kernels: TritonKernels, kind: str) -> None:
    inner, hidden, rows = 40, 600, 70
    weights = [stored(inner, hidden, kind, i) for i in (0, 3)], [stored(hidden, inner, kind, 6)]
    gate_up, down = (kernels.pack_linear(w) for w in weights)
    assert gate_up.nbytes <= 128 * 640 * (0.75 if "int4" in kind else 1.25)  # six bits are kept in eight
    x = randn(rows, hidden, seed=6, dtype=kernels.dtype)
    together = kernels.mlp(x, gate_up, down)
    reference = ReferenceKernels(F32)
    wide = reference.mlp(x.float(), *(reference.pack_linear(w) for w in weights))
    close(together, wide.to(kernels.dtype), kernels.dtype, 6)
    for some in (slice(0, 1), slice(69, 70), slice(5, 40)):
        assert torch.equal(kernels.mlp(x[some], gate_up, down), together[some])


def test_rows_alone_equal_rows_together(kernels: TritonKernels) -> None:
    """Every tile, and both ways of adding the parts of K."""
    packed = kernels.pack_linear([stored(n, 1100, "int4 with zeros", n) for n in (60, 5)])
    assert packed.data.splits == 2
    x = randn(140, 1100, seed=1, dtype=kernels.dtype)
    together = kernels.linear(x, packed, F32)
    for first, rows in [(139, 1), (5, 17), (1, 40)]:
        some = slice(first, first + rows)
        assert torch.equal(kernels.linear(x[some], packed, F32), together[some]), (first, rows)
    for kind in ("int4", "int4 with zeros"):
        narrow = kernels.pack_linear([stored(24, 96, kind, 1)])
        together = kernels.linear(x[:, :96], narrow, F32)  # in tiles of 128 rows, of 64 inputs where groups are small
        for some in (slice(3, 4), slice(100, 140)):
            assert torch.equal(kernels.linear(x[some, :96], narrow, F32), together[some])


@pytest.mark.parametrize("kind", INTEGERS)
def test_experts_and_their_rows_alone(kernels: TritonKernels, kind: str) -> None:
    bank, wide = (filled_banks([k], 4, 160, 48, kind)[0] for k in (kernels, ReferenceKernels(F32)))
    x = randn(40, 160, seed=3, dtype=kernels.dtype)
    run = {2: list(range(40)), 0: [4, 9]}
    pairs = pairs_of(run)
    together = kernels.experts(x, bank, *pairs)
    close(together, ReferenceKernels(F32).experts(x.float(), wide, *pairs).to(kernels.dtype), kernels.dtype, 6)
    for row, outputs in ((0, together[0]), (39, together[39])):
        assert torch.equal(kernels.experts(x[row][None], bank, *pairs_of({2: [0]}))[0], outputs)


def test_a_bank_holds_experts_that_are_stored_otherwise(
    kernels: TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkpoint whose MTP layer is not quantised: each expert gives what it gives in a bank of its like."""
    kinds = ["int4", "fp8", "bf16", "int4 with zeros", "int4"]
    mixed = kernels.expert_bank(len(kinds) + 1, 96, 32)
    x = randn(9, 96, seed=5, dtype=kernels.dtype)
    pairs = pairs_of({e: [e, 8] for e in range(len(kinds))})
    alone = []
    for slot, kind in enumerate(kinds):
        weights = stored(32, 96, kind, slot), stored(32, 96, kind, slot + 20), stored(96, 32, kind, slot + 40)
        mixed.load(slot, *weights)
        own = kernels.expert_bank(1, 96, 32)
        own.load(0, *weights)
        alone.append(kernels.experts(x, own, *pairs_of({0: [slot, 8]})))
    assert len(mixed.variants) == 4
    assert torch.equal(kernels.experts(x, mixed, *pairs), torch.cat(alone))
    monkeypatch.setattr(mixed, "empty", lambda slots: [])  # as on a GPU, where the host doesn't see the slots
    out = kernels.experts(x, mixed, *pairs_of({5: [0], 1: [1, 8]}))
    assert out[0].isnan().all() and torch.equal(out[1:], alone[1])
    mixed.drop(0)  # the first of its form: another one stands for it
    mixed.drop(2)
    assert len(mixed.variants) == 3
    assert torch.equal(kernels.experts(x, mixed, *pairs_of({4: [4, 8]})), alone[4])
    mixed.drop(4)
    assert len(mixed.variants) == 2
