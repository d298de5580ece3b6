"""Kernels, weights, experts and caches for the tests of the Triton kernels: in Triton's CPU interpreter where
TRITON_INTERPRET=1 is set, else on this machine's GPU."""

from __future__ import annotations

import torch
import triton
from from_host import FromHost
from weight_cases import BF16, F32, randn

from isotherm.kernels.ops import Kernels
from isotherm.kernels.triton.backend import TritonKernels

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


def triton_kernels(dtype: torch.dtype) -> TritonKernels:
    """Given and giving tensors on the CPU, wherever they compute."""
    kernels = TritonKernels(dtype, DEVICE)
    return kernels if DEVICE == "cpu" else FromHost(kernels)  # type: ignore[return-value]


KERNELS = {dtype: triton_kernels(dtype) for dtype in (BF16, F32)}


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, steps: float = 2.0) -> None:
    """Within `steps` roundings of `dtype`, of the element or of the largest in its row (cancellation)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    unit = (2**-8 if dtype == BF16 else 2**-19) * steps
    size = expected.float().abs()
    bound = unit * (size + (size.amax(-1, keepdim=True) if size.numel() else 0.0)) + 1e-6
    difference = (actual.float() - expected.float()).abs()
    assert (difference <= bound).all(), f"off by {(difference / bound).max().item():.2f} of the tolerance"


def pairs_of(expert_rows: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [r for rs in expert_rows.values() for r in rs]
    offsets = [0]
    for rs in expert_rows.values():
        offsets.append(offsets[-1] + len(rs))
    first, second, third = (torch.tensor(v, dtype=torch.int32) for v in (rows, list(expert_rows), offsets))
    return first, second, third


class Paged:
    """A cache with sequences of given lengths in shuffled blocks; everything that no sequence owns is NaN."""

    def __init__(self, kernels: Kernels, lengths: list[int], block_size: int, latent: int, rotary: int, seed: int = 0):
        counts = [-(-n // block_size) for n in lengths]
        ids = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1).to(torch.int32)
        self.cache = torch.full((sum(counts) + 1, block_size, latent + rotary), torch.nan, dtype=kernels.dtype)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for s, (length, mine) in enumerate(zip(lengths, ids.split(counts), strict=True)):
            self.tables[s, : len(mine)] = mine
            position = torch.arange(length)
            slots = mine[position // block_size].long() * block_size + position % block_size
            self.cache.view(-1, latent + rotary)[slots] = randn(length, latent + rotary, seed=s, dtype=kernels.dtype)
