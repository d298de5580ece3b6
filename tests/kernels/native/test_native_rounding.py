"""Weights rounded in C++: the bits that torch's statement gives, on every instruction set, whatever the numbers are."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_cases import runnable
from native_there import require_native
from torch import Tensor
from weight_cases import BF16, F32, FP8, randn

from isotherm.kernels.formats import grouped
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GROUP, Int4Weight, Int6Weight, Int8Weight
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.native import rounding
from isotherm.kernels.native.library import NativeKernelsUnavailable
from isotherm.kernels.native.rounding import NativeRounding

require_native()

ROUNDING = {isa: NativeRounding(isa) for isa in runnable()}
FORMS = (Int4Weight, Int6Weight, Int8Weight)
PLAIN = {"bf16": BF16, "f16": torch.float16, "f32": F32}


def quantised(form: type[Int4Weight | Int8Weight], weight: StoredWeight, native: NativeRounding | None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "native_rounding", lambda: native)
        return form.quantise(weight)


def same(found: Tensor, stated: Tensor) -> bool:
    """To the bit, but that one NaN is as good as another."""
    nan = found.isnan() if found.is_floating_point() else torch.zeros(found.shape, dtype=torch.bool)
    bits = torch.int32 if found.itemsize == 4 else torch.uint8
    return bool((nan == stated.isnan()).all()) and torch.equal(found.view(bits)[~nan], stated.view(bits)[~nan])


def check(weight: StoredWeight, forms=FORMS) -> None:
    for form in forms:
        stated = quantised(form, weight, None)
        for isa, native in ROUNDING.items():
            found = quantised(form, weight, native)
            assert found.shape == stated.shape and found.group == stated.group == GROUP
            for ours, theirs in zip(found.tensors, stated.tensors, strict=True):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and same(ours, theirs), (isa, form)


def fp8(data: Tensor, seed: int) -> Fp8Weight:
    """Any codes but NaN, and scales of any sign and size."""
    rows, columns = data.shape
    codes = torch.randint(0, 256, data.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    return Fp8Weight(codes.view(FP8), randn(-(-rows // 128), -(-columns // 128), seed=seed + 1, scale=1e-3))


# Whole vectors of groups, single ones, groups that end early, odd widths, and more than one chunk of 2048.
SHAPES = [(1, 1), (3, 31), (1, 32), (5, 33), (7, 96), (130, 136), (9, 255), (200, 768), (1030, 71)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*PLAIN, "fp8"])
def test_every_shape_and_format(shape: tuple[int, int], kind: str):
    data = randn(*shape, seed=sum(shape), scale=0.02)
    check(fp8(data, 3) if kind == "fp8" else PlainWeight(data.to(PLAIN[kind])))


@given(seed=st.integers(0, 1 << 30), narrow=st.booleans())
def test_any_finite_bits(seed: int, narrow: bool):
    """Of float32, subnormals and the largest among them: each group has exponents of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (int(n) for n in torch.randint(1, 100, (2,), generator=generator))
    words = torch.randint(-(1 << 31), 1 << 31, (rows, columns), generator=generator).int()
    middle = torch.randint(0, 255, (rows, 1), generator=generator)
    exponents = middle + torch.randint(-3, 4, (rows, columns), generator=generator)
    words = words & ~0x7F800000 | (exponents.clamp(0, 254) << 23).int()
    data = words.view(F32)
    check(PlainWeight(data.to(BF16) if narrow and bool(data.to(BF16).isfinite().all()) else data))


@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    repeat=st.integers(1, 5),
)
def test_what_hypothesis_thinks_of(numbers: list[float], repeat: int):
    check(PlainWeight(torch.tensor([numbers * repeat, numbers[::-1] * repeat])))


@given(seed=st.integers(0, 1 << 30))
def test_ties(seed: int):
    """Numbers in halves of a scale, which are as near to one code as to the next; and the largest on both sides."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(-17, 18, (40, 64), generator=generator).float()
    scale = 2.0 ** torch.randint(-20, 20, (40, 1), generator=generator).float()
    data = halves / 2 * scale * torch.tensor([1.0, 1.109375])[torch.randint(0, 2, (40, 1), generator=generator)]
    data[::3, 0], data[::3, 1] = data[::3].abs().amax(1), -data[::3].abs().amax(1)
    check(PlainWeight(data))
    check(PlainWeight(data.to(BF16)))


def test_zeros():
    data = torch.zeros(20, 64)
    data[1, 3:60:2] = -0.0
    data[2] = -0.0
    data[3, 5] = 1e-45  # its scale would be 0
    data[4, 40] = -3e-40
    check(PlainWeight(data))
    check(PlainWeight(data.to(BF16)))


def test_rows_that_lie_apart():
    check(PlainWeight(randn(40, 200, seed=1).to(BF16)[:, 7:107]))
    check(PlainWeight(randn(200, 40, seed=2).T))
    check(fp8(randn(256, 130, seed=3), 5).transpose(F32))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_what_is_not_finite(bad: float, dtype: torch.dtype):
    """Four bits refuse it; six and eight give its group a scale that is not finite either, and other groups what
    they had."""
    for place in (0, 31, 69, 5 * 70 + 33, 20 * 70 - 1):
        data = randn(20, 70, seed=9).to(dtype)
        data.flatten()[place] = bad
        check(PlainWeight(data), [Int6Weight, Int8Weight])
        for native in (None, *ROUNDING.values()):
            with pytest.raises(ValueError, match="has numbers that are not finite"):
                quantised(Int4Weight, PlainWeight(data), native)
            assert int((~quantised(Int8Weight, PlainWeight(data), native).scales.isfinite()).sum()) == 1
    check(PlainWeight(torch.full((3, 40), bad, dtype=dtype)), [Int6Weight, Int8Weight])


def test_fp8_that_is_not_finite():
    codes = fp8(randn(130, 150, seed=1), 2)
    wrong = codes.data.view(torch.uint8).clone()
    wrong[129, 149] = 0xFF
    for weight in (Fp8Weight(wrong.view(FP8), codes.scale), Fp8Weight(codes.data, codes.scale * torch.inf)):
        check(weight, [Int6Weight, Int8Weight])
        for native in (None, *ROUNDING.values()):
            with pytest.raises(ValueError, match="has numbers that are not finite"):
                quantised(Int4Weight, weight, native)


def test_what_it_does_not_read_is_refused():
    native = ROUNDING["generic"]
    with pytest.raises(ValueError, match=r"float16 \(2, 32\) is no weight \(2, 32\)"):
        native.int4([torch.zeros(2, 32, dtype=torch.float16)], (2, 32))
    with pytest.raises(ValueError, match=r"float32 \(2, 32\) is no weight \(2, 64\)"):
        native.in_bytes(8, [torch.zeros(2, 32)], (2, 64))


def test_without_native_kernels_torch_rounds_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    weight = PlainWeight(randn(4, 64, seed=5))
    expected = Int4Weight.quantise(weight)

    def unavailable() -> NativeRounding:
        raise NativeKernelsUnavailable("no compiler was there")

    rounding._made.cache_clear()
    monkeypatch.setattr(rounding, "NativeRounding", unavailable)
    try:
        with caplog.at_level(logging.WARNING):
            found = [Int4Weight.quantise(weight) for _ in range(3)]
    finally:
        rounding._made.cache_clear()
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["no compiler was there"]
    assert all(torch.equal(f.nibbles, expected.nibbles) and torch.equal(f.scales, expected.scales) for f in found)
