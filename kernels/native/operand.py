"""A tensor of a stored weight, as C++ reads it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float8_e4m3fn: 3, torch.uint8: 4,
           torch.int8: 5}  # Dtype in api.h  # fmt: skip


class Operand(ctypes.Structure):
    """Rows, whose elements lie side by side; `Operand` in api.h."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("dtype", ctypes.c_int))

    @classmethod
    def of(cls, rows: Tensor) -> Operand:
        if rows.dtype not in _DTYPES:
            raise TypeError(f"a tensor of a stored weight is {rows.dtype}; known are {list(_DTYPES)}")
        return cls(rows.data_ptr(), rows.stride(0), _DTYPES[rows.dtype])


def side_by_side(rows: Tensor) -> Tensor:
    """The same, copied where the elements of a row lie apart."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
