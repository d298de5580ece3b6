"""Corrections to the numerics of Triton's CPU interpreter (seen in 3.7.1), so that kernels are checked unchanged, as a
GPU would compute them.

- float32 → bfloat16 truncates there; a GPU rounds to nearest even.
- float8e4nv's NaN becomes 480; here every code is torch's value. What is rounded to it is rounded as torch does it,
  which agrees with a GPU up to 448; beyond, a GPU gives 448.
- tl.dot multiplies the bit patterns of bfloat16 operands as integers. Here operands are widened, and summed in float64
  before one rounding to float32, so that the result does not depend on how a CPU's matrix library treats a tile's
  shape, as a tensor core's doesn't.

`install` changes nothing unless TRITON_INTERPRET is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def _widen(data: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype == tl.float8e4nv:
        values: np.ndarray = _FP8_VALUES[data]
        return values
    return data


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Correct the interpreter of this process, once."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    if getattr(InterpreterBuilder, "_isotherm_corrected", False):
        return

    def cast(self: Any, src: Any, dst_type: Any, *_: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        data = _widen(src.data, source)
        if target == tl.bfloat16:
            return TensorHandle(_to_bfloat16(data.astype(np.float32)), target)
        if target == tl.float8e4nv:
            rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), target)
        return TensorHandle(data.astype(_get_np_dtype(target)), target)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = (_widen(side.data, side.dtype.scalar).astype(np.float64) for side in (a, b))
        return TensorHandle(np.matmul(left, right).astype(np.float32) + d.data, d.dtype.scalar)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = cast
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder._isotherm_corrected = True
