"""The native CPU kernels against the reference, and the promise that a row's bits don't depend on its company.

Tolerances: bfloat16 keeps 8 significant bits, so a rounded result may be off by 2^-8 of its size (the reference and the
kernel round sums that were added in different orders), and products of rounded intermediates by a few times that.
Float32 results differ by summation order only.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import LATENT, ROTARY, WIDTH, attention_rows, attention_weights, native, runnable
from native_there import require_native
from weight_cases import BF16, F32, FP8, INTEGERS, filled_banks, randn, stored, taken

from isotherm.kernels.cache_rows import new_layer_cache
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import Int4Weight, Int6Weight, Int8Weight, pack_nibbles
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.library import NativeKernelsUnavailable, load
from isotherm.kernels.ops import Kernels, Router
from isotherm.kernels.reference import ReferenceKernels, candidates, gumbel_noise

pytestmark = pytest.mark.slow

require_native()

KINDS = ("bf16", "fp8", "int4", "int6", "int8")
SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(
    params=[(isa, dtype) for isa in runnable() for dtype in (BF16, F32)], ids=lambda p: f"{p[0]}-{str(p[1])[6:]}"
)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return native(request.param[1], 2, request.param[0])


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, steps: float = 2.0) -> None:
    """Within `steps` roundings of `dtype`, of the element or of the largest in its row (cancellation)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    unit = (2**-8 if dtype == BF16 else 2**-19) * steps
    size = expected.float().abs()
    bound = unit * (size + (size.amax(-1, keepdim=True) if size.numel() else 0.0)) + 1e-6
    difference = (actual.float() - expected.float()).abs()
    assert (difference <= bound).all(), f"off by {(difference / bound).max().item():.2f} of the tolerance"


def exact_linear(x: torch.Tensor, weights: list[StoredWeight], bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.float() @ torch.cat([w.dequantise(F32) for w in weights]).T
    return out if bias is None else out + bias


# --- against the reference ------------------------------------------------------------------------


@SETTINGS
@given(
    rows=st.sampled_from([0, 1, 2, 5, 8, 9, 17, 33]),
    columns=st.sampled_from([1, 16, 31, 64, 127, 128, 129, 200, 384]),
    parts=st.lists(st.sampled_from([1, 7, 32, 33, 100, 160]), min_size=1, max_size=3),
    kind=st.sampled_from(["bf16", "f16", "f32", "fp8", *INTEGERS]),
    bias=st.booleans(),
    wide=st.booleans(),
)
def test_linear(
    kernels: NativeKernels, rows: int, columns: int, parts: list[int], kind: str, bias: bool, wide: bool
) -> None:
    weights = [stored(n, columns, kind, seed) for seed, n in enumerate(parts)]
    b = randn(sum(parts), seed=9) if bias else None
    x = randn(rows, columns, seed=10, dtype=kernels.dtype)
    packed = kernels.pack_linear(weights, b)
    assert (packed.out_features, packed.in_features) == (sum(parts), columns)
    out = kernels.linear(x, packed, F32 if wide else None)
    expected = exact_linear(taken(x, weights[0], kernels.instructions), weights, b).to(out.dtype)
    if kind not in ("f16", "f32") or kernels.dtype == F32:
        close(out, expected, F32 if wide else kernels.dtype)
    else:
        close(out, expected, BF16)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("rows", [1, 20])
def test_fp8_decode_is_exact_for_every_code(isa: str, rows: int) -> None:
    """Unit vectors pick single weights out, so each output is one decoded code times a power of two."""
    kernels = native(BF16, 1, isa)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN would spread over its row
    weight = codes.view(FP8).repeat(40, 1)  # [40, 256]
    packed = kernels.pack_linear([Fp8Weight(weight, torch.tensor([[4.0, 0.25]]))])
    seen = torch.cat([kernels.linear(x, packed, F32)[:, :40] for x in torch.eye(256, dtype=BF16).split(rows)])
    expected = codes.view(FP8).float() * torch.tensor([4.0] * 128 + [0.25] * 128)
    assert torch.equal(seen, expected[:, None].expand(256, 40))
    nan = torch.zeros(32, 2, dtype=torch.uint8)
    nan[3, 0], nan[20, 1] = 0x7F, 0xFF
    out = kernels.linear(
        torch.ones(rows, 2, dtype=BF16), kernels.pack_linear([Fp8Weight(nan.view(FP8), torch.ones(1, 1))])
    )
    assert torch.equal(out.isnan().any(0).nonzero().flatten(), torch.tensor([3, 20]))


def with_outliers(rows: int, columns: int, share: float, seed: int) -> torch.Tensor:
    """bf16 weights, a share of which lies up to 60 octaves off."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-60, 60, (rows, columns), generator=generator) * (
        torch.rand(rows, columns, generator=generator) < share
    )
    return (torch.randn(rows, columns, generator=generator) * torch.exp2(octaves.float())).bfloat16()


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("rows", [1, 12, 20, 60])
@pytest.mark.parametrize(("outputs", "columns"), [(32, 64), (70, 301), (33, 514)])
def test_coded_weights_are_what_they_were(isa: str, rows: int, outputs: int, columns: int) -> None:
    """Unit vectors pick single weights out: of a tile whose exponents all have codes, and of one with exceptions."""
    kernels = native(BF16, 2, isa)
    for share in (0.0, 0.02):
        weight = with_outliers(outputs, columns, share, seed=3)
        packed = kernels.pack_linear([PlainWeight(weight)])
        seen = torch.cat([kernels.linear(x, packed, F32) for x in torch.eye(columns, dtype=BF16).split(rows)])
        assert torch.equal(seen, weight.float().T)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 30, 36, 37, 100])
@pytest.mark.parametrize("columns", [64, 255, 257, 1024])
def test_coded_weights_give_the_bits_of_plain_ones(isa: str, rows: int, columns: int) -> None:
    """A second part full of exceptions keeps both parts plain."""
    kernels = native(BF16, 2, isa)
    x = randn(rows, columns, seed=5, dtype=BF16)
    weight, wild = (PlainWeight(with_outliers(96, columns, share, seed=4)) for share in (0.01, 1.0))
    coded, plain = kernels.pack_linear([weight]), kernels.pack_linear([weight, wild])
    assert plain.nbytes == 2 * 96 * (columns + columns % 2) * 2
    if kernels.isa != "generic":
        assert coded.nbytes < 0.85 * 96 * columns * 2
    assert torch.equal(kernels.linear(x, coded, F32), kernels.linear(x, plain, F32)[:, :96])


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("rows", [1, 2, 20, 60])
def test_integers_are_exact(isa: str, rows: int) -> None:
    """Unit vectors pick single weights out: every code less every zero point, and all of int6 and int8."""
    kernels = native(BF16, 2, isa)
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 2)  # 16 outputs, each with its own zero point
    zeros = torch.arange(16, dtype=torch.uint8)[:, None]
    six = torch.arange(-31, 33).clamp(max=31).to(torch.int8).view(2, 32)
    eight = torch.arange(-127, 129).clamp(max=127).to(torch.int8).view(8, 32)
    for weight in (
        Int4Weight(pack_nibbles(codes), torch.full((16, 1), 0.3), zeros),
        Int4Weight(pack_nibbles(codes), torch.full((16, 1), -0.5)),
        Int6Weight(six, torch.full((2, 1), 0.7)),
        Int8Weight(eight, torch.full((8, 1), 0.7)),
    ):
        packed = kernels.pack_linear([weight])
        seen = torch.cat([kernels.linear(x, packed, F32) for x in torch.eye(32, dtype=BF16).split(rows)])
        assert torch.equal(seen.T, weight.dequantise(F32))


def test_integers_that_are_scaled_unlike_stand_side_by_side() -> None:
    kernels = native(BF16)
    weights = [stored(40, 200, kind, 1) for kind in ("int4", "int4 with zeros")]
    x = randn(3, 200, seed=2, dtype=BF16)
    close(kernels.linear(x, kernels.pack_linear(weights)), exact_linear(x, weights).to(BF16), BF16)


@pytest.mark.parametrize("isa", runnable())
def test_scales_of_a_byte_give_what_longer_ones_do(isa: str) -> None:
    """To the bit. A weight's scales have a byte each where all of them, and of what stands beside it, can."""
    kernels = native(BF16, 2, isa)
    for rows, inputs in ((64, 256), (33, 250), (70, 38), (1, 1)):
        weight = stored(rows, inputs, "int4", rows)
        assert isinstance(weight, Int4Weight)
        each = torch.arange(weight.scales.numel()).view(weight.scales.shape)
        scales = weight.scales.sign() * (1 + each % 16 / 16) * 2.0 ** (each % 8 - 20)
        for least in (scales, scales * 2.0**-100, scales * 2.0**120):
            short = Int4Weight(weight.nibbles, least, None, weight.group, inputs)
            alone = kernels.pack_linear([short])
            largest = torch.ldexp(torch.tensor(1.0), torch.frexp(least.abs().max())[1] - 1)
            for other in (largest * 2.0**-8, largest * (1 + 1 / 32)):  # too small, too long
                beside = Int4Weight(weight.nibbles, torch.full_like(least, float(other)), None, weight.group, inputs)
                long = kernels.pack_linear([short, beside])
                for count in (1, 2, 5, 13, 60):
                    x = randn(count, inputs, seed=count, dtype=BF16)
                    assert torch.equal(kernels.linear(x, alone, F32), kernels.linear(x, long, F32)[:, :rows])
                tiles, groups = -(-rows // 32), -(-inputs // 32)
                assert (alone.nbytes, long.nbytes) == (tiles * groups * 32 * 17, 2 * tiles * groups * 32 * 18)
            x = randn(13, inputs, seed=1, dtype=BF16)
            close(kernels.linear(x, alone), exact_linear(x, [short]).to(BF16), BF16)


def test_scales_of_four_bits_have_a_byte() -> None:
    kernels = native(BF16)
    assert kernels.pack_linear([stored(64, 256, "int4", 0)]).nbytes == 64 * 256 * 17 // 32
    assert kernels.pack_linear([stored(64, 256, "int4 with zeros", 0)]).nbytes > 64 * 256 * 17 // 32


@pytest.mark.parametrize("isa", runnable())
def test_of_the_same_integers_six_bits_give_what_eight_do(isa: str) -> None:
    """To the bit, in three quarters of the codes' bytes."""
    kernels = native(BF16, 2, isa)
    for rows, inputs in ((64, 256), (33, 250), (70, 38), (1, 1)):
        six = stored(rows, inputs, "int6", rows)
        assert isinstance(six, Int6Weight)
        packed = [kernels.pack_linear([w]) for w in (six, Int8Weight(six.data, six.scales, six.group))]
        for count in (1, 2, 5, 13, 60):
            x = randn(count, inputs, seed=count, dtype=BF16)
            assert torch.equal(*(kernels.linear(x, weight, F32) for weight in packed))
    assert kernels.pack_linear([stored(64, 256, "int6", 0)]).nbytes == 64 * 256 * 13 // 16


def test_mixed_parts_and_strided_sources() -> None:
    kernels = native(BF16)
    plain, scaled = stored(40, 256, "bf16", 0), stored(33, 256, "fp8", 1)
    x = randn(3, 512, seed=2, dtype=BF16)[:, 128:384]  # rows lie apart
    close(kernels.linear(x, kernels.pack_linear([plain, scaled])), exact_linear(x, [plain, scaled]).to(BF16), BF16)
    wide = randn(40, 300, seed=3, dtype=BF16)
    view = PlainWeight(wide[:, 20:276])
    close(kernels.linear(x, kernels.pack_linear([view])), exact_linear(x, [view]).to(BF16), BF16)
    assert kernels.pack_linear([scaled]).nbytes < 40 * 256 * 2


@SETTINGS
@given(
    rows=st.sampled_from([0, 1, 3, 8, 20]),
    heads=st.integers(1, 5),
    n=st.sampled_from([16, 33, 128]),
    k=st.sampled_from([15, 16, 64, 130]),
)
def test_head_linear(kernels: NativeKernels, rows: int, heads: int, n: int, k: int) -> None:
    weight = randn(heads, k, n, seed=1, dtype=kernels.dtype, scale=k**-0.5).transpose(1, 2)
    x = randn(rows, heads, k + 6, seed=2, dtype=kernels.dtype)[..., :k]
    expected = torch.einsum("thk,hnk->thn", x.float(), weight.float()).to(kernels.dtype)
    close(kernels.head_linear(x, kernels.pack_heads([PlainWeight(w) for w in weight])), expected, kernels.dtype)


@SETTINGS
@given(rows=st.sampled_from([0, 1, 7, 40]), hidden=st.sampled_from([33, 64, 256]),
       inner=st.sampled_from([17, 32, 96, 160]), kind=st.sampled_from(KINDS))  # fmt: skip
def test_mlp(kernels: NativeKernels, rows: int, hidden: int, inner: int, kind: str) -> None:
    reference = ReferenceKernels(kernels.dtype)
    gate, up, down = stored(inner, hidden, kind, 0), stored(inner, hidden, kind, 2), stored(hidden, inner, kind, 4)
    x = randn(rows, hidden, seed=6, dtype=kernels.dtype)

    def run(k: Kernels) -> torch.Tensor:
        return k.mlp(x, k.pack_linear([gate, up]), k.pack_linear([down]))

    close(run(kernels), run(reference), kernels.dtype, 6)


def pairs_of(expert_rows: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [r for rs in expert_rows.values() for r in rs]
    offsets = [0]
    for rs in expert_rows.values():
        offsets.append(offsets[-1] + len(rs))
    return tuple(torch.tensor(v, dtype=torch.int32) for v in (rows, list(expert_rows), offsets))


@SETTINGS
@given(
    data=st.data(),
    hidden=st.sampled_from([48, 128]),
    inner=st.sampled_from([32, 50]),
    kind=st.sampled_from(["bf16", "fp8", "int4", "int4 with zeros"]),
)
def test_experts(kernels: NativeKernels, data: st.DataObject, hidden: int, inner: int, kind: str) -> None:
    reference = ReferenceKernels(kernels.dtype)
    banks = filled_banks([kernels, reference], 6, hidden, inner, kind)
    rows = data.draw(st.integers(1, 20))
    chosen = data.draw(st.permutations(range(5)))[: data.draw(st.integers(0, 5))]
    run = {e: sorted(data.draw(st.sets(st.integers(0, rows - 1), max_size=rows))) for e in chosen}
    pairs = pairs_of(run)
    x = randn(rows, hidden, seed=1, dtype=kernels.dtype)
    close(kernels.experts(x, banks[0], *pairs), reference.experts(x, banks[1], *pairs), kernels.dtype, 6)


def test_bank_memory_and_errors() -> None:
    kernels = native(BF16)
    (bank,) = filled_banks([kernels], 3, 256, 96, "fp8")
    full = bank.nbytes
    assert full >= 2 * 3 * 256 * 96
    x = randn(2, 256, seed=0, dtype=BF16)
    with pytest.raises(KeyError, match=r"\[2\]"):
        kernels.experts(x, bank, *pairs_of({0: [0], 2: [1]}))
    with pytest.raises(IndexError):
        kernels.experts(x, bank, *pairs_of({0: [2]}))
    with pytest.raises(ValueError, match="slots take"):
        bank.load(0, *(stored(96, 128, "bf16", 0),) * 3)
    assert load().iso_bank_create(1 << 50, 256, 96) is None, "there is no memory for so many slots"
    bank.drop(1)
    assert bank.nbytes == full // 2
    with pytest.raises(KeyError):
        kernels.experts(x, bank, *pairs_of({1: [0]}))


def test_slots_are_refilled_and_memory_returns() -> None:
    """Slots big enough for the regions of memory.cpp, dropped and filled again in another order, hold what was loaded
    last."""
    kernels = native(BF16)
    hidden, inner, slots = 512, 320, 12
    bank, x = kernels.expert_bank(slots, hidden, inner), randn(2, 512, seed=1, dtype=BF16)
    weights = [
        tuple(stored(*shape, "bf16", 3 * i + j) for j, shape in enumerate([(inner, hidden)] * 2 + [(hidden, inner)]))
        for i in range(4)
    ]
    alone, sizes = [], []
    for w in weights:
        one = kernels.expert_bank(1, hidden, inner)
        one.load(0, *w)
        sizes.append(one.nbytes)
        alone.append(kernels.experts(x, one, *pairs_of({0: [0, 1]})))
    held = {}
    for step in range(60):
        slot = step * 7 % slots
        if step % 5 == 4:
            bank.drop(slot)
            held.pop(slot, None)
        else:
            held[slot] = step % 4
            bank.load(slot, *weights[held[slot]])
    assert max(sizes) <= 2 * 3 * hidden * inner
    assert bank.nbytes == sum(sizes[which] for which in held.values())
    out = kernels.experts(x, bank, *pairs_of({slot: [0, 1] for slot in held}))
    assert torch.equal(out, torch.cat([alone[which] for which in held.values()]))


def test_mlp_takes_gate_and_up_as_one_matrix() -> None:
    kernels = native(BF16)
    both, down = stored(128, 96, "bf16", 0), stored(96, 64, "bf16", 1)
    halves = [PlainWeight(both.data[:64]), PlainWeight(both.data[64:])]
    x = randn(3, 96, seed=2, dtype=BF16)
    one, two = (kernels.mlp(x, kernels.pack_linear(w), kernels.pack_linear([down])) for w in ([both], halves))
    assert torch.equal(one, two)


@SETTINGS
@given(rows=st.sampled_from([0, 1, 6, 70]), width=st.sampled_from([8, 33, 512, 1536]))
def test_rms_norm(kernels: NativeKernels, rows: int, width: int) -> None:
    x, weight = (
        randn(rows, width + 5, seed=1, dtype=kernels.dtype)[:, :width],
        randn(width, seed=2, dtype=kernels.dtype),
    )
    expected = ReferenceKernels(kernels.dtype).rms_norm(x, weight, 1e-6)
    close(kernels.rms_norm(x, weight, 1e-6), expected, kernels.dtype, 1)
    residual = randn(rows, width, seed=3, dtype=kernels.dtype)
    total = (residual.float() + x.float()).to(kernels.dtype)
    fused = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(fused, kernels.rms_norm(total, weight, 1e-6))


@SETTINGS
@given(rows=st.sampled_from([0, 1, 9]), heads=st.sampled_from([1, 3, 16]), width=st.sampled_from([2, 6, 64]))
def test_rope_equals_the_reference(kernels: NativeKernels, rows: int, heads: int, width: int) -> None:
    x = randn(rows, heads, width + 10, seed=1, dtype=kernels.dtype)[..., 10:]
    angle = randn(rows, width // 2, seed=2, scale=5.0)
    assert torch.equal(
        kernels.rope(x, angle.cos(), angle.sin()), ReferenceKernels(kernels.dtype).rope(x, angle.cos(), angle.sin())
    )


@SETTINGS
@given(
    rows=st.sampled_from([0, 1, 5, 40]),
    hidden=st.sampled_from([32, 100, 256]),
    shape=st.sampled_from([(8, 1, 1, 2), (64, 8, 4, 8), (6, 3, 1, 2), (4, 4, 2, 2), (256, 8, 4, 8)]),
    normalise=st.booleans(),
)
def test_route(
    kernels: NativeKernels, rows: int, hidden: int, shape: tuple[int, int, int, int], normalise: bool
) -> None:
    experts, groups, kept, k = shape
    router = Router(
        randn(experts, hidden, seed=1, scale=hidden**-0.5),
        randn(experts, seed=2, scale=0.1),
        groups,
        kept,
        k,
        normalise,
        2.5,
    )
    x = randn(rows, hidden, seed=3, dtype=kernels.dtype)
    ids, weights = kernels.route(x, router)
    expected_ids, expected_weights = ReferenceKernels(kernels.dtype).route(x, router)
    assert torch.equal(ids, expected_ids)  # these seeds have no two scores within float32 rounding of each other
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "hidden"), [(1, 256), (1, 100), (5, 100), (40, 256)])
def test_a_router_in_bfloat16_gives_the_bits_of_the_same_in_float32(
    kernels: NativeKernels, rows: int, hidden: int
) -> None:
    narrow = Router(randn(62, hidden, seed=1, dtype=BF16), randn(62, seed=2, scale=0.1), 2, 1, 6, True, 2.5)
    x = randn(rows, hidden, seed=3, dtype=kernels.dtype)
    for one, other in zip(
        kernels.route(x, narrow), kernels.route(x, replace(narrow, weight=narrow.weight.float())), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("vocab", [5, 1024, 5000])
def test_the_likeliest_token_is_the_first_of_the_largest(kernels: NativeKernels, vocab: int) -> None:
    nothing = torch.zeros(1, dtype=torch.float64), *[torch.zeros(1, dtype=torch.int64)] * 3
    logits = randn(1, vocab, seed=1).clamp(max=3.0)
    for at in range(0, vocab, max(1, vocab // 37)):
        changed = logits.clone()
        changed[0, at] = changed[0, vocab - 1] = 4.0
        changed[0, at // 2] = math.nan if at // 2 < at else changed[0, at // 2]
        assert kernels.sample(changed, nothing[0], *nothing).item() == at
    assert kernels.sample(torch.full((1, vocab), -math.inf), nothing[0], *nothing).item() == 0
    assert kernels.sample(torch.full((1, vocab), math.nan), nothing[0], *nothing).item() == -1


def test_route_ties_go_to_the_lower_id() -> None:
    router = Router(torch.zeros(16, 32), torch.zeros(16), 4, 2, 3, True, 1.0)
    ids, weights = native(BF16).route(randn(2, 32, seed=0, dtype=BF16), router)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


@SETTINGS
@given(rows=st.sampled_from([0, 1, 5, 30]), width=st.sampled_from([7, 64, 1024]), k=st.integers(1, 8))
def test_combine_equals_the_reference(kernels: NativeKernels, rows: int, width: int, k: int) -> None:
    y = randn(rows * k + 1, width, seed=1, dtype=kernels.dtype)
    index = torch.randperm(rows * k, generator=torch.Generator().manual_seed(2)).reshape(rows, k)
    weights = randn(rows, k, seed=3)
    own, residual = (randn(rows, width, seed=seed, dtype=kernels.dtype) for seed in (4, 5))
    for terms in ((), (own,), (None, residual), (own, residual)):
        assert torch.equal(
            kernels.combine(y, index, weights, *terms),
            ReferenceKernels(kernels.dtype).combine(y, index, weights, *terms),
        )


@pytest.mark.parametrize(
    ("kind", "low_rank", "biased"),
    [("fp8", 40, False), ("bf16", None, True), ("f32", 24, True), ("fp8", None, False), ("int4", 40, True)],
)
@pytest.mark.parametrize(("decodes", "chunks"), [([0, 9, 30], []), ([], [(0, 7)]), ([300, 2], [(0, 5), (8, 30)])])
def test_attention_in_one_call_equals_its_operations(
    kernels: NativeKernels, kind: str, low_rank: int | None, biased: bool, decodes, chunks
) -> None:
    weights = attention_weights(kernels, kind, low_rank, biased)
    rows, blocks = attention_rows(decodes, chunks)
    count = len(rows.cache_slots)
    out = []
    for attention in (NativeKernels.attention, Kernels.attention):
        x, cache = (
            randn(count, WIDTH, seed=7, dtype=kernels.dtype),
            randn(blocks, 4, LATENT + ROTARY, seed=8, dtype=kernels.dtype),
        )
        out.append((attention(kernels, x, weights, rows, cache), x, cache))
    assert all(torch.equal(one, other) for one, other in zip(*out, strict=True))
    reference = ReferenceKernels(kernels.dtype)
    x, cache = (
        randn(count, WIDTH, seed=7, dtype=kernels.dtype),
        randn(blocks, 4, LATENT + ROTARY, seed=8, dtype=kernels.dtype),
    )
    reference.attention(x, attention_weights(reference, kind, low_rank, biased), rows, cache)
    # Nine roundings to dtype lie between x before and after; FP8 weights are rounded to bfloat16 by the reference
    # alone.
    torch.testing.assert_close(
        out[0][1].float(),
        x.float(),
        rtol=0,
        atol=(0.06 if kernels.dtype == BF16 else 1e-4) * float(x.float().abs().max()),
    )


def test_attention_refuses_what_lies_outside_the_cache(kernels: NativeKernels) -> None:
    weights = attention_weights(kernels, "bf16", 40, False)
    rows, blocks = attention_rows([5], [(0, 3)])
    cache = torch.zeros(blocks - 1, 4, LATENT + ROTARY, dtype=kernels.dtype)
    x = randn(4, WIDTH, seed=7, dtype=kernels.dtype)
    with pytest.raises(IndexError, match="cache of 2 blocks"):
        kernels.attention(x, weights, rows, cache)
    for wrong in (
        replace(rows, cos_TR2=rows.cos_TR2[:, 1:], sin_TR2=rows.sin_TR2[:, 1:]),
        replace(rows, sin_TR2=rows.sin_TR2[1:]),
    ):
        with pytest.raises(ValueError, match="cosines"):
            kernels.attention(x, weights, wrong, torch.zeros(blocks, 4, LATENT + ROTARY, dtype=kernels.dtype))
    with pytest.raises(ValueError, match="rotary must be even, not 15"):
        kernels.attention(x, replace(weights, rotary=15), rows, cache)
    with pytest.raises(ValueError, match=r"\(4, 96\) is needed"):
        kernels.attention(x[:3], weights, rows, torch.zeros(blocks, 4, LATENT + ROTARY, dtype=kernels.dtype))


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("shared", [None, 64, 160])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_a_moe_layer_in_one_call_equals_its_operations(
    kernels: NativeKernels, kind: str, shared: int | None, rows: int
) -> None:
    (bank,) = filled_banks([kernels], 9, 160, 64, kind)
    slots = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4], dtype=torch.int32)
    router = Router(randn(8, 160, seed=1, scale=0.1), randn(8, seed=2, scale=0.1), 4, 2, 3, True, 2.5)
    mlp = (None, None)
    if shared:  # 64: as wide as an expert, so that it joins them
        gate_up = kernels.pack_linear([stored(shared, 160, kind, i) for i in (3, 4)])
        mlp = gate_up, kernels.pack_linear([stored(160, shared, kind, 5)])
    x, residual = randn(rows, 160, seed=6, dtype=kernels.dtype), randn(rows, 160, seed=7, dtype=kernels.dtype)
    one, other = (moe(kernels, x, router, bank, slots, *mlp, residual) for moe in (NativeKernels.moe, Kernels.moe))
    assert torch.equal(one, other)
    if not shared:
        with pytest.raises(KeyError, match="not in the bank"):
            kernels.moe(x, router, bank, torch.full_like(slots, -1), None, None, residual)


def test_a_moe_layer_follows_its_experts(kernels: NativeKernels) -> None:
    """What is bound once, by the router, is bound anew for another bank or other slots, and slots that change in place
    are seen."""
    banks = filled_banks([kernels, kernels], 9, 160, 64, "bf16")
    banks[1].load(0, *(stored(*shape, "bf16", 91 + i) for i, shape in enumerate([(64, 160), (64, 160), (160, 64)])))
    router = Router(randn(8, 160, seed=1, scale=0.1), randn(8, seed=2, scale=0.1), 4, 2, 3, True, 2.5)
    x, residual = randn(30, 160, seed=6, dtype=kernels.dtype), randn(30, 160, seed=7, dtype=kernels.dtype)
    slots = torch.arange(8, dtype=torch.int32)

    def check(bank: ExpertBank, slot_of: torch.Tensor) -> torch.Tensor:
        one, other = (
            moe(kernels, x, router, bank, slot_of, None, None, residual) for moe in (NativeKernels.moe, Kernels.moe)
        )
        assert torch.equal(one, other)
        return one

    first = check(banks[0], slots)
    assert not torch.equal(check(banks[1], slots), first)
    assert torch.equal(check(banks[0], slots.long()), first)
    slots[:2] = torch.tensor([1, 0])
    assert not torch.equal(check(banks[0], slots), first)
    wide = torch.zeros(8, 2, dtype=torch.int32)
    wide[:, 0] = slots
    apart = wide[:, 0]
    check(banks[0], apart)
    apart[:2] = torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(check(banks[0], apart), first)
    for wrong in (residual[:3], residual[:, :3]):
        with pytest.raises(ValueError, match="residual"):
            kernels.moe(x, router, banks[0], slots, None, None, wrong)


class Paged:
    """A cache with sequences of given lengths in shuffled blocks; everything that no sequence owns is NaN."""

    def __init__(self, kernels: Kernels, lengths: list[int], block_size: int, latent: int, rotary: int, seed: int = 0):
        counts = [-(-n // block_size) for n in lengths]
        ids = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1).to(torch.int32)
        self.cache = torch.full((sum(counts) + 1, block_size, latent + rotary), torch.nan, dtype=kernels.dtype)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        self.entries = []
        for s, (length, mine) in enumerate(zip(lengths, ids.split(counts), strict=True)):
            self.tables[s, : len(mine)] = mine
            position = torch.arange(length)
            slots = mine[position // block_size].long() * block_size + position % block_size
            entry = randn(length, latent + rotary, seed=seed * 100 + s, dtype=kernels.dtype)
            kernels.write_cache(entry[:, :latent], entry[:, latent:], self.cache, slots)
            assert torch.equal(self.cache.view(-1, latent + rotary)[slots], entry)
            self.entries.append(entry)


@SETTINGS
@given(
    lengths=st.lists(st.sampled_from([1, 2, 15, 33, 200, 513, 1100]), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 8, 48, 64]),
    shape=st.sampled_from([(1, 32, 16), (3, 40, 6), (16, 64, 32), (20, 512, 64), (2, 33, 2)]),
    data=st.data(),
)
def test_mla_decode(
    kernels: NativeKernels, lengths: list[int], block_size: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    heads, latent, rotary = shape
    paged = Paged(kernels, lengths, block_size, latent, rotary)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    seen = [data.draw(st.integers(max(1, lengths[s] - 3), lengths[s])) for s in rows]
    q = randn(len(rows), heads, latent + rotary, seed=5, dtype=kernels.dtype)
    arguments = (
        paged.cache,
        paged.tables,
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(seen, dtype=torch.int32),
        (latent + rotary) ** -0.5,
    )
    expected = ReferenceKernels(kernels.dtype).mla_decode(q[..., :latent], q[..., latent:], *arguments)
    close(kernels.mla_decode(q[..., :latent], q[..., latent:], *arguments), expected, kernels.dtype)


@SETTINGS
@given(
    start=st.sampled_from([0, 1, 63, 500, 512]),
    rows=st.sampled_from([0, 1, 7, 65, 130]),
    block_size=st.sampled_from([4, 48]),
    shape=st.sampled_from([(1, 32, 16, 16, 16), (3, 40, 6, 10, 22), (2, 64, 32, 64, 32), (5, 33, 2, 17, 30)]),
    kind=st.sampled_from(["bf16", "fp8", "int4", "int4 with zeros"]),
)
def test_mla_prefill(
    kernels: NativeKernels, start: int, rows: int, block_size: int, shape: tuple[int, int, int, int, int], kind: str
) -> None:
    heads, latent, rotary, nope, value = shape
    reference = ReferenceKernels(kernels.dtype)
    paged = Paged(kernels, [max(start + rows, 1)], block_size, latent, rotary)
    kv_b = stored(heads * (nope + value), latent, kind, 3)
    q = randn(rows, heads, nope + rotary, seed=4, dtype=kernels.dtype)
    out = kernels.mla_prefill(q, paged.cache, paged.tables[0], start, kernels.pack_linear([kv_b]), value, 0.2)
    expected = reference.mla_prefill(q, paged.cache, paged.tables[0], start, reference.pack_linear([kv_b]), value, 0.2)
    close(out, expected, kernels.dtype, 3)


# --- bits don't depend on company -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "fp8", *INTEGERS])
@pytest.mark.parametrize("columns", [96, 321, 1024])
def test_linear_rows_alone_equal_rows_together(kernels: NativeKernels, kind: str, columns: int) -> None:
    packed = kernels.pack_linear([stored(n, columns, kind, n) for n in (100, 64)])
    x = randn(300, columns, seed=1, dtype=kernels.dtype)
    together = kernels.linear(x, packed, F32)
    alone = torch.cat([kernels.linear(row, packed, F32) for row in x[:40].split(1)])
    assert torch.equal(alone, together[:40])
    for rows in (2, 3, 7, 8, 9, 13, 31):
        assert torch.equal(kernels.linear(x[5 : 5 + rows], packed, F32), together[5 : 5 + rows])


def test_head_linear_mlp_and_experts_rows_alone_equal_rows_together(kernels: NativeKernels) -> None:
    weight = kernels.pack_heads([PlainWeight(w) for w in randn(3, 48, 40, seed=1)])
    x = randn(21, 3, 40, seed=2, dtype=kernels.dtype)
    assert torch.equal(
        torch.cat([kernels.head_linear(row, weight) for row in x.split(1)]), kernels.head_linear(x, weight)
    )
    kinds = ("bf16", "fp8", "int4", "int4 with zeros", "int6", "int8")
    for kind, hidden in [(kind, hidden) for kind in kinds for hidden in (160, 162)]:  # 81 words: the last has no other
        (bank,) = filled_banks([kernels], 5, hidden, 64, kind)
        x = randn(30, hidden, seed=3, dtype=kernels.dtype)
        run = {2: list(range(30)), 0: [4, 9], 3: [1], 1: list(range(3, 20))}
        together = kernels.experts(x, bank, *pairs_of(run))
        place = 0
        for expert, rows in run.items():
            for row in rows:
                alone = kernels.experts(x[row : row + 1], bank, *pairs_of({expert: [0]}))
                assert torch.equal(alone[0], together[place]), (kind, hidden, expert, row)
                place += 1
        gate_up, down = (
            kernels.pack_linear([stored(64, hidden, kind, i) for i in (0, 3)]),
            kernels.pack_linear([stored(hidden, 64, kind, 6)]),
        )
        assert torch.equal(
            torch.cat([kernels.mlp(row, gate_up, down) for row in x.split(1)]), kernels.mlp(x, gate_up, down)
        )


def test_decode_rows_alone_equal_rows_together(kernels: NativeKernels) -> None:
    """Alone, a row's splits are computed apart and merged; among many, in one go. Other rows, tables and block sizes
    change nothing."""
    lengths = [1300, 40, 513, 1024, 7, 600, 12, 512, 900, 3]
    paged = Paged(kernels, lengths, 16, 64, 32)
    q = randn(len(lengths), 20, 96, seed=5, dtype=kernels.dtype)
    sequence, length = torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    together = kernels.mla_decode(q[..., :64], q[..., 64:], paged.cache, paged.tables, sequence, length, 0.1)
    other = Paged(kernels, lengths, 48, 64, 32)
    assert torch.equal(other.entries[0], paged.entries[0])
    for t in range(len(lengths)):
        one = slice(t, t + 1)
        alone = kernels.mla_decode(
            q[one, :, :64], q[one, :, 64:], other.cache, other.tables[one], sequence[:1], length[one], 0.1
        )
        assert torch.equal(alone[0], together[t]), t
    # Several rows of one sequence, as speculation verifies them, equal the same rows one by one.
    three = torch.tensor([1298, 1299, 1300], dtype=torch.int32)
    first = torch.zeros(3, dtype=torch.int32)
    several = kernels.mla_decode(q[:3, :, :64], q[:3, :, 64:], paged.cache, paged.tables, first, three, 0.1)
    for t in range(3):
        one = slice(t, t + 1)
        alone = kernels.mla_decode(
            q[one, :, :64], q[one, :, 64:], paged.cache, paged.tables, first[:1], three[one], 0.1
        )
        assert torch.equal(alone[0], several[t])


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_prefill_chunks_equal_one_prefill(kernels: NativeKernels, kind: str) -> None:
    heads, latent, rotary, nope, value = 3, 64, 16, 24, 40
    length = 1100
    paged = Paged(kernels, [length], 16, latent, rotary)
    kv_b = kernels.pack_linear([stored(heads * (nope + value), latent, kind, 3)])
    q = randn(length, heads, nope + rotary, seed=4, dtype=kernels.dtype)
    whole = kernels.mla_prefill(q, paged.cache, paged.tables[0], 0, kv_b, value, 0.2)
    for cuts in ([0, 1, 2, 70, 511, 513, 1100], [0, 512, 1024, 1100], [0, 333, 1099, 1100]):
        for begin, end in pairwise(cuts):
            later = paged.cache.clone()
            if end < length:  # what follows must not matter, be it NaN
                slots = paged.tables[0][torch.arange(end, length) // 16].long() * 16 + torch.arange(end, length) % 16
                later.view(-1, latent + rotary)[slots] = torch.nan
            chunk = kernels.mla_prefill(q[begin:end], later, paged.tables[0], begin, kv_b, value, 0.2)
            assert torch.equal(chunk, whole[begin:end]), (begin, end)


def everything(kernels: Kernels) -> list[torch.Tensor]:
    """Every operation once, in sizes that are spread over threads."""
    dtype = kernels.dtype
    x = randn(37, 512, seed=1, dtype=dtype)
    out = []
    for kind in KINDS:
        packed = kernels.pack_linear([stored(n, 512, kind, n) for n in (576, 100)])
        out += [kernels.linear(x, packed), kernels.linear(x[:1], packed)]
        out.append(
            kernels.mlp(
                x,
                kernels.pack_linear([stored(200, 512, kind, i) for i in (0, 3)]),
                kernels.pack_linear([stored(512, 200, kind, 6)]),
            )
        )
        (bank,) = filled_banks([kernels], 4, 512, 160, kind)
        out.append(kernels.experts(x, bank, *pairs_of({0: list(range(37)), 2: [1, 2, 3], 1: [9]})))
        paged = Paged(kernels, [700, 90], 16, 64, 32)
        kv_b = kernels.pack_linear([stored(4 * 96, 64, kind, 3)])
        out.append(
            kernels.mla_prefill(
                randn(200, 4, 64 + 32, seed=4, dtype=dtype), paged.cache, paged.tables[0], 500, kv_b, 32, 0.1
            )
        )
    q = randn(2, 16, 96, seed=5, dtype=dtype)
    last = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([700, 90], dtype=torch.int32)
    out.append(kernels.mla_decode(q[..., :64], q[..., 64:], paged.cache, paged.tables, *last, 0.1))
    out.append(
        kernels.head_linear(
            randn(9, 8, 64, seed=6, dtype=dtype),
            kernels.pack_heads([PlainWeight(w) for w in randn(8, 128, 64, seed=7)]),
        )
    )
    out.append(kernels.rms_norm(x.repeat(8, 1), randn(512, seed=8), 1e-6))
    angle = randn(37, 32, seed=9)
    out.append(kernels.rope(randn(37, 64, 64, seed=10, dtype=dtype), angle.cos(), angle.sin()))
    out += kernels.route(x, Router(randn(64, 512, seed=11, scale=0.05), randn(64, seed=12), 8, 4, 6, True, 2.5))
    for kind, low_rank, biased in (("fp8", 40, True), ("bf16", None, False)):
        rows, blocks = attention_rows([0, 300], [(8, 30)])
        weights = attention_weights(kernels, kind, low_rank, biased)
        for fp8 in (False, True):
            cache = new_layer_cache(blocks, 4, LATENT, ROTARY, dtype, kernels.device, fp8)
            out.append(kernels.attention(randn(32, WIDTH, seed=7, dtype=dtype), weights, rows, cache))
    (bank,) = filled_banks([kernels], 9, 512, 160, "fp8")
    router = Router(randn(8, 512, seed=15, scale=0.05), randn(8, seed=16), 4, 2, 3, True, 2.5)
    shared = (
        kernels.pack_linear([stored(200, 512, "bf16", i) for i in (0, 3)]),
        kernels.pack_linear([stored(512, 200, "bf16", 6)]),
    )
    out.append(kernels.moe(x, router, bank, torch.arange(8, dtype=torch.int32), *shared, x.flip(0)))
    out.append(kernels.combine(x, torch.arange(36).reshape(12, 3), randn(12, 3, seed=13)))
    logits = randn(5, 4000, seed=14, scale=3)
    temperature, top_p, top_k = (
        torch.tensor([0, 1, 0.7, 1.5, 1.0]),
        torch.tensor([1, 1, 0.9, 0.5, 1]),
        torch.tensor([0, 0, 0, 50, 7]),
    )
    out.append(kernels.sample(logits, temperature, top_p, top_k, torch.arange(5), torch.arange(5) * 100))
    return out


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_thread_counts_agree(dtype: torch.dtype) -> None:
    one, two, three = (everything(native(dtype, threads)) for threads in (1, 2, 3))
    for i, (a, b, c) in enumerate(zip(one, two, three, strict=True)):
        assert torch.equal(a, b) and torch.equal(a, c), i


def test_callers_in_several_threads_agree() -> None:
    kernels = native(BF16, 3)
    expected = everything(kernels)
    wrong: list[int] = []

    def call() -> None:
        for _ in range(3):
            wrong.extend(
                i for i, (a, b) in enumerate(zip(expected, everything(kernels), strict=True)) if not torch.equal(a, b)
            )

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- sampling -------------------------------------------------------------------------------------


@SETTINGS
@given(
    vocab=st.sampled_from([1, 2, 63, 64, 1000, 20_001]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 30_000]),
    masked=st.booleans(),
)
def test_sample_equals_the_reference(
    kernels: NativeKernels, vocab: int, spread: float, temperature: float, top_p: float, top_k: int, masked: bool
) -> None:
    rows = 6
    logits = (randn(rows, vocab, seed=vocab) * spread).to(BF16).float()  # rounded, so that equal logits occur
    if masked and vocab > 2:
        logits[:, ::2] = -torch.inf
    seeds = torch.tensor([0, -1, 2**62, 12345, -(2**63), 7])
    parameters = (torch.full((rows,), temperature, dtype=torch.float64),
                  torch.full((rows,), top_p, dtype=torch.float64), torch.full((rows,), top_k), seeds,
                  torch.arange(rows) * 1_000_003)  # fmt: skip
    chosen = kernels.sample(logits, *parameters)
    expected = ReferenceKernels(F32).sample(logits, *parameters)
    for t in (chosen != expected).nonzero().flatten().tolist():
        # Softmax sums in another order may move the edge of top-p by one token when p lies on it to the last bits.
        _, kept = candidates(logits[t] / temperature, top_p, top_k)
        before = kept.double().softmax(-1).cumsum(-1)
        assert top_p < 1 and (before - before[-1]).abs().lt(1e-12).sum() >= 1, (t, chosen[t], expected[t])
        assert (before[-1] * logits[t].div(temperature).double().exp().sum() - top_p).abs() < 1e-9


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("place", ["one", "all"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_no_distribution_still_gives_a_token(
    kernels: NativeKernels, value: float, place: str, top_p: float, top_k: int
) -> None:
    """Broken weights, or a penalty that overflows: whatever it is worth, the thread goes on. The rows beside it have
    what they would have."""
    logits = randn(3, 1000, seed=2)
    logits[1, 17 if place == "one" else slice(None)] = value
    heat = torch.ones(3, dtype=torch.float64)
    parameters = heat, heat * top_p, torch.full((3,), top_k), torch.arange(3), torch.arange(3)
    chosen = kernels.sample(logits, *parameters)
    if value != value and place == "all":
        assert chosen[1] == ReferenceKernels(F32).sample(logits, *parameters)[1] == -1, "no number is no token"
    else:
        assert 0 <= chosen[1] < 1000 and (value != torch.inf or place == "all" or chosen[1] == 17)
    expected = ReferenceKernels(F32).sample(logits[::2], *(p[::2] for p in parameters))
    assert torch.equal(chosen[::2], expected)


def test_sample_full_vocabulary_and_noise() -> None:
    logits = randn(3, 129_280, seed=1, scale=2.5)
    one = torch.ones(3, dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.int64)
    for index in range(5):
        parameters = (one, one, zeros, torch.tensor([1, 2, 3]), torch.full((3,), index))
        noisy = logits.double() + torch.stack([gumbel_noise(seed, index, torch.arange(129_280)) for seed in (1, 2, 3)])
        assert torch.equal(native(BF16).sample(logits, *parameters), noisy.argmax(-1))


# --- the boundary ---------------------------------------------------------------------------------


def test_errors_name_what_is_wrong() -> None:
    kernels = native(BF16)
    packed = kernels.pack_linear([stored(32, 64, "bf16", 0)])
    with pytest.raises(ValueError, match=r"linear x is torch\.float32"):
        kernels.linear(randn(1, 64, seed=0), packed)
    with pytest.raises(ValueError, match=r"\[T, 64\]"):
        kernels.linear(randn(1, 32, seed=0, dtype=BF16), packed)
    with pytest.raises(ValueError, match=r"all need 64 inputs"):
        kernels.pack_linear([stored(32, 64, "bf16", 0), stored(32, 65, "bf16", 0)])
    with pytest.raises(ValueError, match="not one of"):
        NativeKernels(BF16, isa="sse9")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        NativeKernels(torch.float16)
    with pytest.raises(IndexError, match="slots must lie"):
        kernels.write_cache(
            torch.zeros(1, 4, dtype=BF16),
            torch.zeros(1, 2, dtype=BF16),
            torch.zeros(2, 8, 6, dtype=BF16),
            torch.tensor([16]),
        )
    table, one, q = (
        torch.tensor([[5]], dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        torch.zeros(1, 1, 6, dtype=BF16),
    )
    with pytest.raises(IndexError, match="mla_decode"):
        kernels.mla_decode(q[..., :4], q[..., 4:], torch.zeros(2, 8, 6, dtype=BF16), table, one - 1, one, 1.0)
    router = Router(torch.zeros(8, 64), torch.zeros(4), 4, 2, 3, True, 1.0)
    with pytest.raises(ValueError, match=r"weight \(8, 64\) and bias \(4,\)"):
        kernels.route(randn(1, 64, seed=0, dtype=BF16), router)
    for backend in (kernels, ReferenceKernels(BF16)):
        gate_up, down = (
            backend.pack_linear([stored(32, 64, "bf16", 0)] * 2),
            backend.pack_linear([stored(32, 32, "bf16", 1)]),
        )
        with pytest.raises(ValueError, match="takes rows of 64; down gives rows of 32"):
            backend.mlp(randn(1, 64, seed=0, dtype=BF16), gate_up, down)
    assert kernels.isa in kernels.describe() and "2 threads" in kernels.describe()


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(NativeKernelsUnavailable, match=r"gone\.so"):
        load(tmp_path / "gone.so")


def test_address_sanitizer(tmp_path: Path) -> None:
    """Every operation on every path under AddressSanitizer, in a process of its own."""
    sources = sorted((Path(__file__).parents[3] / "kernels" / "native" / "csrc").glob("*.cpp"))
    compiler = shutil.which("g++")
    if compiler is None or not sources:
        pytest.skip("needs g++ and a source checkout")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this g++ has no AddressSanitizer runtime")
    flags = [
        "-O0",
        "-g1",
        "-std=c++17",
        "-pthread",
        "-fPIC",
        "-ffp-contract=off",
        "-fsanitize=address",
        "-fno-omit-frame-pointer",
    ]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    builds = [
        subprocess.Popen([compiler, *flags, "-c", source, "-o", out])
        for source, out in zip(sources, objects, strict=True)
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    library = tmp_path / "native_asan.so"
    subprocess.run([compiler, "-shared", "-fsanitize=address", "-pthread", *objects, "-o", library], check=True)
    environment = {
        "LD_PRELOAD": str(Path(runtime).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PATH": "/usr/bin:/bin",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "helpers")
    run = subprocess.run(
        [sys.executable, __file__, str(library)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert run.returncode == 0, run.stderr[-4000:]


if __name__ == "__main__":  # the sanitizer's subprocess: a library of its own, so that the installed one stays as it is
    for path in runnable():
        for precision in (BF16, F32):
            everything(NativeKernels(precision, 2, path, Path(sys.argv[1])))
            print(path, precision, "clean")


@pytest.mark.parametrize("width", [1, 31, 32, 64, 257, 4099])
def test_forbid_leaves_what_is_allowed_to_the_bit(width: int):
    generator = torch.Generator().manual_seed(width)
    words = torch.randint(-(1 << 31), 1 << 31, (3, -(-width // 32)), generator=generator).int()
    words[1] = -1
    logits = torch.randn(5, width + 3, generator=generator)[:, :width]
    logits[0, 0] = torch.nan
    expected, got = logits.clone(), logits.clone()
    ReferenceKernels(torch.float32).forbid(expected, [4, 0, 2], words)
    for isa in runnable():
        got = torch.empty(5, width + 3)[:, :width].copy_(logits)
        native(F32, 2, isa).forbid(got, [4, 0, 2], words)
        assert torch.equal(got.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))
    for wrong in ([0, 1, 5], [0, 1]):
        with pytest.raises(ValueError, match="forbid"):
            native(F32, 2, "generic").forbid(got, wrong, words)
