"""What a stored weight is to the kernels, whatever its format: a matrix that can be dequantised and cut.

A format has to say how it is made of its tensors, its shape, and `dequantise`; a backend then packs what that gives.
It says more where more is to be had: `can_cut`, `rows` and `transpose` that keep it as it is stored. A backend that
multiplies by a format as it is stored knows it by its class (kernels/native/weights.py, kernels/triton/weights.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class StoredWeight(ABC):
    """A matrix [N, K] as the checkpoint stores it."""

    name: ClassVar[str]  # key of kernels/formats/registry.py

    @classmethod
    @abstractmethod
    def of(cls, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> StoredWeight:
        """From role → tensor as the checkpoint has them, and the format's parameters, both as its class in
        cluster/model/formats names them."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, in the order in which kernels of this format take it."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @abstractmethod
    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`; scales are applied in float32."""

    def can_cut(self, row: int) -> bool:
        """Whether rows that begin or end there can be had as they are stored."""
        return False

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> StoredWeight:
        """Rows begin … end-1: as they are stored where that can be, else dequantised to `dtype`."""
        return self.plain(dtype).rows(begin, end, dtype)

    def cut(self, size: int, dtype: torch.dtype) -> list[StoredWeight]:
        """All rows, `size` at a time: as they are stored where every part can be, else cut out of one matrix that is
        dequantised to `dtype`."""
        begins, end = range(0, self.shape[0], size), self.shape[0]
        whole = self if all(map(self.can_cut, (*begins, end))) else self.plain(dtype)
        return [whole.rows(begin, min(begin + size, end), dtype) for begin in begins]

    def transpose(self, dtype: torch.dtype) -> StoredWeight:
        """[K, N]: as it is stored where that can be, else dequantised to `dtype`."""
        return self.plain(dtype).transpose(dtype)

    def plain(self, dtype: torch.dtype) -> PlainWeight:
        """Dequantised to `dtype`, but where it is plain already: then as it is."""
        return PlainWeight(self.dequantise(dtype))

    @classmethod
    def quantise(cls, weight: StoredWeight) -> StoredWeight:
        """`weight` in this format. Raises TypeError for a format that only checkpoints are in."""
        raise TypeError(f"weights cannot be quantised to {cls.name} here; it is a format of checkpoints only")


class PlainWeight(StoredWeight):
    """The numbers themselves: `data` [N, K] in bf16, fp16 or fp32."""

    name = "plain"
    DTYPES = (torch.bfloat16, torch.float16, torch.float32)

    def __init__(self, data: Tensor):
        if data.dtype not in self.DTYPES or data.dim() != 2:
            raise TypeError(
                f"a plain weight is {data.dtype} {tuple(data.shape)}; [N, K] in one of {self.DTYPES} is needed"
            )
        self.data = data

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> PlainWeight:
        return cls(tensors["data"])

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.data,)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self.data.to(dtype)

    def can_cut(self, row: int) -> bool:
        return True

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> PlainWeight:
        return PlainWeight(self.data[begin:end])

    def transpose(self, dtype: torch.dtype) -> PlainWeight:
        return PlainWeight(self.data.T)

    def plain(self, dtype: torch.dtype) -> PlainWeight:
        return self
