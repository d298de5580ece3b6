"""Rounding to four bits: nothing that is tried loses less, and every machine finds the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isotherm.kernels.formats import registry, rounding
from isotherm.kernels.formats.grouped import Int4Weight
from isotherm.kernels.formats.rounding import HIGHEST, LOWEST, REACHES, nearest_int4, sum_by_halves
from isotherm.kernels.formats.stored import PlainWeight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale_of_int4(number: Tensor) -> Tensor:
    """Four bits after the point."""
    mantissa, exponent = torch.frexp(number)  # of a half and more
    return torch.ldexp((mantissa * 32).round(), exponent - 5)


def loss(groups: Tensor, scales: Tensor) -> Tensor:
    codes = (groups / scales[:, None]).round().clamp(LOWEST, HIGHEST)
    return ((codes * scales[:, None] - groups).double() ** 2).sum(1)


def test_no_scale_that_is_tried_loses_less():
    groups = normal(3000, 32)
    codes, scales = nearest_int4(groups)
    assert codes.dtype == torch.int8 and codes.amin() == LOWEST and codes.amax() <= HIGHEST
    assert torch.equal(scales, scale_of_int4(scales)) and bool((scales < 0).any())
    found = loss(groups, scales)
    assert torch.equal(codes.float(), (groups / scales[:, None]).round().clamp(LOWEST, HIGHEST))
    farthest = groups.gather(1, groups.abs().argmax(1, keepdim=True))[:, 0]
    for reach in REACHES:
        assert bool((found <= loss(groups, scale_of_int4(farthest / -reach)) * 1.00001).all())
    plain = loss(groups, (groups.abs().amax(1) / 7).bfloat16().float())
    assert found.sum() < 0.80 * plain.sum()  # of the squares; what rounding to the nearest alone would lose


def test_short_scales_cost_a_hundredth(monkeypatch: pytest.MonkeyPatch):
    groups = normal(6000, 32, seed=2)
    short = loss(groups, nearest_int4(groups)[1]).sum()
    monkeypatch.setattr(rounding, "INT4_SCALE_BITS", rounding.SCALE_BITS)
    assert 1.005 < (short / loss(groups, nearest_int4(groups)[1]).sum()).sqrt() < 1.012


def test_the_search_depends_on_nothing_but_the_group(monkeypatch: pytest.MonkeyPatch):
    groups = normal(700, 32, seed=1)
    codes, scales = nearest_int4(groups)
    monkeypatch.setattr(rounding, "CHUNK", 7)
    again = nearest_int4(groups)
    assert torch.equal(codes, again[0]) and torch.equal(scales, again[1])
    backwards = nearest_int4(groups.flip(0))
    assert torch.equal(codes, backwards[0].flip(0)) and torch.equal(scales, backwards[1].flip(0))


def test_sums_are_of_halves():
    """1 is lost beside 2²⁴ and not beside another 1."""
    column = torch.tensor([2.0**24, 1.0, 0.0, 1.0])[:, None]
    assert sum_by_halves(column).item() == 2.0**24 + 2 and sum_by_halves(column.flip(0)).item() == 2.0**24 + 2
    assert sum_by_halves(column[[0, 2, 1, 3]]).item() == 2.0**24


def test_nothing_is_lost_of_what_four_bits_can_hold():
    codes = torch.randint(LOWEST, HIGHEST + 1, (50, 32), generator=torch.Generator().manual_seed(3)).float()
    codes[:, 0] = LOWEST
    groups = codes * torch.tensor(0.0125).bfloat16().float()  # whose scale has more bits than others get
    found, scales = nearest_int4(groups)
    assert torch.equal(found * scales[:, None], groups)
    assert not nearest_int4(torch.zeros(2, 32))[0].any()


def test_what_is_not_finite_is_refused():
    for bad in (float("inf"), float("nan")):
        groups = normal(3, 32)
        groups[1, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            nearest_int4(groups)


@pytest.mark.parametrize("name", ["int4", "int6", "int8", "fp8"])
def test_a_large_weight_is_quantised_in_parts(name: str, monkeypatch: pytest.MonkeyPatch):
    weight = PlainWeight(normal(300, 96, seed=4).bfloat16())
    whole = registry.quantised(name, weight)
    monkeypatch.setattr(registry, "PART_BYTES", 1)
    parts = registry.quantised(name, weight)
    assert type(parts) is type(whole) and parts.shape == whole.shape
    assert torch.equal(parts.dequantise(torch.float32), whole.dequantise(torch.float32))
    assert registry.quantised(name, parts) is parts


def test_a_weight_is_quantised_by_it():
    weight = normal(20, 96)
    found = Int4Weight.quantise(PlainWeight(weight))
    codes, scales = nearest_int4(weight.view(-1, 32))
    assert torch.equal(found.dequantise(torch.float32), (codes * scales[:, None]).view(20, 96))
