"""FP8 e4m3 with one float32 scale for each block of 128×128: DeepSeek-V3's own format (arXiv:2412.19437, §3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isotherm.kernels.formats.stored import StoredWeight

BLOCK = 128
E4M3 = torch.float8_e4m3fn


class Fp8Weight(StoredWeight):
    """`data` float8_e4m3fn [N, K] and `scale` float32 [⌈N/128⌉, ⌈K/128⌉]: weight = data × scale of its block."""

    name = "fp8"

    def __init__(self, data: Tensor, scale: Tensor):
        if data.dtype != E4M3 or data.dim() != 2:
            raise TypeError(f"an FP8 weight is {data.dtype} {tuple(data.shape)}; [N, K] in {E4M3} is needed")
        blocks = tuple(-(-n // BLOCK) for n in data.shape)
        if tuple(scale.shape) != blocks:
            raise ValueError(
                f"scales have shape {tuple(scale.shape)}; an FP8 weight {tuple(data.shape)} needs {blocks}"
            )
        self.data, self.scale = data, scale.float()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> Fp8Weight:
        return cls(tensors["data"], tensors["scale"])

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.data, self.scale

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape
        scale = self.scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (self.data.float() * scale).to(dtype)

    def can_cut(self, row: int) -> bool:
        """Where no block of scales is cut."""
        return row % BLOCK == 0 or row >= len(self.data)

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> StoredWeight:
        if not (self.can_cut(begin) and self.can_cut(end)):
            return super().rows(begin, end, dtype)
        return Fp8Weight(self.data[begin:end], self.scale[begin // BLOCK : -(-end // BLOCK)])

    def transpose(self, dtype: torch.dtype) -> Fp8Weight:
        return Fp8Weight(self.data.T, self.scale.T)

    @classmethod
    def quantise(cls, weight: StoredWeight) -> Fp8Weight:
        """The largest of each block becomes 448, e4m3's largest."""
        if isinstance(weight, Fp8Weight):
            return weight
        (rows, columns), (down, across) = weight.shape, (-(-n // BLOCK) for n in weight.shape)
        padded = torch.nn.functional.pad(
            weight.dequantise(torch.float32), (0, across * BLOCK - columns, 0, down * BLOCK - rows)
        )
        blocks = padded.view(down, BLOCK, across, BLOCK)
        scale = (blocks.abs().amax((1, 3)) / torch.finfo(E4M3).max).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
        return cls(codes.to(E4M3), scale)
