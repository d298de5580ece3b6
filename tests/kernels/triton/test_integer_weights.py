"""How grouped integers lie for the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from weight_cases import INTEGERS, stored

from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int8Weight
from isotherm.kernels.triton.integer_weights import RUN, by_group, codes_by_run, scale_dtype


@pytest.mark.parametrize("kind", INTEGERS)
def test_runs_lie_one_after_the_other(kind: str) -> None:
    weight = stored(5, 100, kind, 1)
    assert isinstance(weight, GroupedWeight)
    runs = codes_by_run(weight, 128)
    if isinstance(weight, Int4Weight):
        assert runs.shape == (2, 5, RUN) and runs.dtype == torch.uint8
        codes, stored_codes = torch.stack([runs & 15, runs >> 4], 1).flatten(0, 1), weight.codes()
    else:
        assert isinstance(weight, Int8Weight) and runs.shape == (4, 5, RUN) and runs.dtype == torch.int8
        codes, stored_codes = runs, weight.data
    for k in range(100):
        assert torch.equal(codes[k // RUN, :, k % RUN], stored_codes[:, k])


def test_scales_lie_by_group() -> None:
    scales = torch.arange(6.0).view(2, 3)
    assert by_group(scales, 32, 128).tolist() == [[0, 3], [1, 4], [2, 5], [0, 0]]


@pytest.mark.parametrize(
    "value, dtype", [(1.5, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, torch.float32),
                     (1e30, torch.float32)]
)  # fmt: skip
def test_scales_are_kept_in_the_narrowest_dtype_that_has_them(value: float, dtype: torch.dtype) -> None:
    weights = [Int8Weight(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[v]])) for v in (1.0, value)]
    assert scale_dtype(weights) == dtype
