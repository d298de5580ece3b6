"""The order in which products on tile registers are summed, as kernels/native/csrc/amx.h says it."""

from __future__ import annotations

import pytest
import torch
from native_cases import native, runnable
from native_there import require_native
from weight_cases import BF16, F32, randn, stored

require_native()

pytestmark = pytest.mark.skipif("amx_bf16" not in runnable(), reason="this machine has no AMX-BF16")
STEP = 32  # inputs


def stated(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, inputs], weight [outputs, inputs], both bfloat16; scales [blocks] of 128 inputs. Each sum is rounded to
    float32 once: products are exact in float64, and so are these sums before that."""
    total = torch.zeros(len(x), len(weight))
    for block, begin in enumerate(range(0, x.shape[1], 128 if scales is not None else x.shape[1])):
        end = min(begin + 128, x.shape[1]) if scales is not None else x.shape[1]
        own = torch.zeros(len(x), len(weight))
        for first in range(begin, end, STEP):
            even, odd = torch.zeros_like(own), torch.zeros_like(own)
            for i in range(first, min(first + STEP, end), 2):
                for sums, at in ((even, i), (odd, i + 1)):
                    product = x[:, at, None].double() * weight[None, :, at].double()
                    sums.copy_((sums.double() + product).float())
            own = own + (even + odd)
        total = own if scales is None else (total.double() + own.double() * scales[block].double()).float()
    return total


@pytest.mark.parametrize("rows", [1, 5, 16, 21, 40])
@pytest.mark.parametrize("inputs", [16, 64, 80, 352])
def test_even_and_odd_inputs_of_a_step_are_summed_apart(rows: int, inputs: int):
    kernels = native(BF16, 1, "amx_bf16")
    weight = stored(70, inputs, "bf16", 3)
    x = randn(rows, inputs, seed=4, dtype=BF16)
    got = kernels.linear(x, kernels.pack_linear([weight], None), F32)
    assert torch.equal(got, stated(x, weight.dequantise(F32).to(BF16)))


def test_the_inputs_of_a_scale_are_summed_apart():
    kernels = native(BF16, 1, "amx_bf16")
    weight = stored(32, 320, "fp8", 3)
    x = randn(9, 320, seed=4, dtype=BF16)
    got = kernels.linear(x, kernels.pack_linear([weight], None), F32)
    codes = weight.data.float().to(BF16)
    assert torch.equal(got, stated(x, codes, weight.scale[0]))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_numbers_near_zero_are_the_same_in_any_company(kind: str):
    """Tile registers take denormals for 0. A row alone goes without them, and so do the inputs of the last part of a
    step."""
    kernels = native(BF16, 1, "amx_bf16")
    packed = kernels.pack_linear([stored(70, 432, kind, 3)], None)
    x = randn(20, 432, seed=4)
    x = (x * 10.0 ** (-37.5 - 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(5)))).to(BF16)
    together = kernels.linear(x, packed, F32)
    assert 0 < (together != 0).sum() < together.numel()
    assert torch.equal(torch.cat([kernels.linear(row, packed, F32) for row in x.split(1)]), together)
