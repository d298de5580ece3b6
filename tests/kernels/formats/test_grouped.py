"""Grouped integers against the format's plainest writing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GROUP, Int4Weight, Int6Weight, Int8Weight, pack_nibbles
from isotherm.kernels.formats.registry import quantised, stored_weight
from isotherm.kernels.formats.stored import PlainWeight


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def int4(rows: int, columns: int, group: int, zeros: bool) -> tuple[Int4Weight, Tensor, Tensor, Tensor | None]:
    groups = -(-columns // group)
    codes, scales = integers(0, 16, rows, columns).to(torch.uint8), 1.0 + integers(0, 99, rows, groups, seed=1)
    points = integers(0, 16, rows, groups, seed=2).to(torch.uint8) if zeros else None
    return Int4Weight(pack_nibbles(codes), scales, points, group, columns), codes, scales, points


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (2, 129), (5, 200)])
def test_int4_is_nibble_less_zero_times_scale(shape: tuple[int, int], group: int, zeros: bool):
    weight, codes, scales, points = int4(*shape, group, zeros)
    numbers = weight.dequantise(torch.float32)
    assert numbers.shape == weight.shape == shape
    for i in range(shape[0]):
        for k in {0, shape[1] // 2, shape[1] - 1}:
            zero = 8 if points is None else int(points[i, k // group])
            assert numbers[i, k] == (int(codes[i, k]) - zero) * scales[i, k // group]
    parts = {"nibbles": weight.nibbles, "scales": scales} | ({} if points is None else {"zeros": points})
    again = stored_weight("int4", parts, {"group": group, "inputs": shape[1]})
    assert torch.equal(again.dequantise(torch.float32), numbers)
    assert weight.nbytes == sum(t.nbytes for t in weight.tensors)


@pytest.mark.parametrize("zeros", [False, True])
def test_rows_stay_as_they_are_stored(zeros: bool):
    weight = int4(40, 101, 32, zeros)[0]
    exact = weight.dequantise(torch.float32)
    rows = weight.rows(3, 17, torch.bfloat16)
    assert isinstance(rows, Int4Weight) and torch.equal(rows.dequantise(torch.float32), exact[3:17])
    assert all(isinstance(part, Int4Weight) for part in weight.cut(7, torch.bfloat16))
    assert torch.equal(weight.transpose(torch.float32).dequantise(torch.float32), exact.T)
    for form in (Int8Weight, Int6Weight):
        whole = form(integers(-31, 32, 40, 101).to(torch.int8), torch.rand(40, 4))
        cut = whole.rows(3, 17, torch.bfloat16)
        assert type(cut) is form
        assert torch.equal(cut.dequantise(torch.float32), whole.dequantise(torch.float32)[3:17])


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).square().sum() / exact.square().sum()).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "turned", "cycle", "inputs"), [(3, 128, 256, 512), (2, 64, 192, 72), (3, 40, 70, 67)]
)
def test_int4_both_ways(heads: int, turned: int, cycle: int, inputs: int, dtype: torch.dtype):
    numbers = torch.randn(heads * cycle, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    blocks = (-(-heads * cycle // 128), -(-inputs // 128))
    stored = PlainWeight(numbers) if dtype != torch.float8_e4m3fn else Fp8Weight(numbers, torch.full(blocks, 0.25))
    weight = quantised("int4", stored, (turned, cycle))
    exact, kept = stored.dequantise(torch.float32), weight.dequantise(torch.float32)
    assert isinstance(weight, Int4Weight) and quantised("int4", weight, (turned, cycle)) is weight
    assert torch.equal(weight.scales.to(torch.bfloat16).float(), weight.scales)
    alone = quantised("int4", stored).dequantise(torch.float32)
    for head in range(heads):
        begin = head * cycle
        keys, values = slice(begin, begin + turned), slice(begin + turned, begin + cycle)
        turned_over = weight.rows(begin, begin + turned, torch.bfloat16).transpose(torch.bfloat16)
        assert isinstance(turned_over, Int4Weight) and turned_over.shape == (inputs, turned)
        assert torch.equal(turned_over.dequantise(torch.float32), kept[keys].T)
        assert torch.equal(kept[values], alone[values])
        assert relative_error(kept[keys], exact[keys]) < 0.115  # 0.08 with a scale for each 32 of them


def test_int4_both_ways_of_what_is_not_finite():
    numbers = torch.randn(64, 32)
    numbers[3, 3] = torch.inf
    with pytest.raises(ValueError, match="numbers that are not finite"):
        quantised("int4", PlainWeight(numbers), (32, 64))


def test_groups_of_inputs_alone_are_not_transposed_as_they_are():
    weight = int4(64, 64, 32, zeros=True)[0]
    assert isinstance(weight.transpose(torch.bfloat16), PlainWeight)
    weight.scales[:], weight.zeros[:] = 0.5, 3
    turned = weight.transpose(torch.bfloat16)
    assert isinstance(turned, Int4Weight) and turned.zeros is not None
    assert torch.equal(turned.dequantise(torch.float32), weight.dequantise(torch.float32).T)
    weight.zeros[5] = 4
    assert isinstance(weight.transpose(torch.bfloat16), PlainWeight)


@pytest.mark.parametrize(("name", "step"), [("int4", 1 / 8), ("int6", 1 / 31), ("int8", 1 / 127)])
@pytest.mark.parametrize("shape", [(128, 256), (20, 131), (1, 3)])
def test_quantised_weights_are_within_half_a_step(name: str, step: float, shape: tuple[int, int]):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    numbers[0] = 0
    weight = quantised(name, PlainWeight(numbers.to(torch.bfloat16)))
    assert isinstance(weight, Int4Weight | Int8Weight) and weight.name == name and quantised(name, weight) is weight
    assert torch.equal(weight.scales.to(torch.bfloat16).float(), weight.scales)
    padded = torch.nn.functional.pad(numbers.to(torch.bfloat16).float(), (0, -shape[1] % GROUP))
    largest = padded.view(shape[0], -1, GROUP).abs().amax(2).repeat_interleave(GROUP, 1)[:, : shape[1]]
    off = (weight.dequantise(torch.float32) - numbers.to(torch.bfloat16).float()).abs()
    if name != "int4":  # rounded scales add 2^-8 of it all
        assert (off <= largest * step / 2 * (1 + 1e-6) + largest * 2**-8).all()
    else:  # the scale is the one of the least error: no group's is larger than where its farthest number is -8 steps
        groups = padded.view(shape[0], -1, GROUP)
        farthest = torch.where(groups.amax(2) > -groups.amin(2), groups.amax(2), groups.amin(2))
        mantissa, exponent = torch.frexp(farthest / -8)  # of five bits
        scales = torch.ldexp((mantissa * 32).round(), exponent - 5).where(farthest != 0, 1.0)[:, :, None]
        nearest = (groups / scales).round().clamp(-8, 7) * scales
        errors = torch.nn.functional.pad(off, (0, -shape[1] % GROUP)).view(groups.shape).square().sum(2)
        assert (errors <= (nearest - groups).square().sum(2) * (1 + 1e-5) + 1e-12).all()
    assert off.square().mean() <= (step * largest).square().mean() / 6


def test_other_tensors_are_refused():
    nibbles = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales have shape \(4, 1\); an int4 weight \(4, 64\) in groups of 32 needs"):
        Int4Weight(nibbles, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"zero points have shape \(1, 2\)"):
        Int4Weight(nibbles, torch.ones(4, 2), torch.zeros(1, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"zero points of an int4 weight are torch.int32"):
        Int4Weight(nibbles, torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="int4 weights have groups of 16 inputs"):
        Int4Weight(nibbles, torch.ones(4, 4), None, 16)
    with pytest.raises(ValueError, match="an int4 weight has 32 bytes a row; 62 inputs need half of that"):
        Int4Weight(nibbles, torch.ones(4, 2), None, 32, 62)
    with pytest.raises(TypeError, match="an int4 weight is torch.int8"):
        Int4Weight(nibbles.to(torch.int8), torch.ones(4, 2))
    with pytest.raises(TypeError, match="an int8 weight is torch.uint8"):
        Int8Weight(nibbles, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"an int6 weight has a code of 0 or 32; they are symmetric, -31 … 31"):
        Int6Weight(torch.arange(33, dtype=torch.int8)[None], torch.ones(1, 2))
    with pytest.raises(ValueError, match="a code of -128"):
        Int8Weight(torch.full((1, 32), -128, dtype=torch.int8), torch.ones(1, 1))
