"""What `isotherm bench kernels` holds kernels against."""

from __future__ import annotations

import pytest
import torch

from isotherm.cluster.cli import bench_kernels


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_the_peak_is_that_of_the_dtype_that_this_machine_multiplies_fast(monkeypatch, slow: torch.dtype):
    largest: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float32: 0}

    def seconds(call, runs: int) -> float:
        product = call(0)
        largest[product.dtype] = max(largest[product.dtype], len(product))
        return float(len(product)) ** 3 * (1e-6 if product.dtype == slow else 1e-9)

    monkeypatch.setattr(bench_kernels, "_median_seconds", seconds)
    assert bench_kernels.matmul_peak(size=64) == pytest.approx(2 * 1e9 / 1e9)
    assert largest[slow] == 8, "no large product where it would take minutes"
