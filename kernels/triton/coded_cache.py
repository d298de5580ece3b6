"""A layer's KV cache in FP8 as the Triton kernels keep it: kernels/cache_rows.py says what a token's row is, and each
block of tokens has all codes first, then all rotary keys, then all scales.

Rows one after the other, as CPUs keep them, would begin on odd multiples of two bytes, and no copy to shared memory is
that narrow. A block takes the same bytes so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotherm.kernels.cache_rows import LEAST_EXPONENT, NAN_CODE

LEAST, NAN = tl.constexpr(LEAST_EXPONENT), tl.constexpr(NAN_CODE)


def planes(cache: Tensor, latent: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views of uint8 [blocks, block size, width]: codes uint8 [blocks, block size, C, padded to whole values], rotary
    keys [blocks, block size, R] and scales [blocks, block size] in `dtype`."""
    blocks, size, width = cache.shape
    coded = -(-latent // dtype.itemsize) * dtype.itemsize
    rotary = (width - coded) // dtype.itemsize - 1
    flat = cache.view(blocks, -1)
    values = flat[:, size * coded :].view(dtype)
    return (
        flat[:, : size * coded].view(blocks, size, coded),
        values[:, : size * rotary].view(blocks, size, rotary),
        values[:, size * rotary :],
    )


def gathered(cache: Tensor, slots_NK: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """Tokens of a cache as a cache of N blocks of K tokens."""
    size, width = cache.shape[1:]
    chosen = (plane[slots_NK // size, slots_NK % size] for plane in planes(cache, latent, dtype))
    return torch.cat([t.flatten(1).view(torch.uint8) for t in chosen], 1).view(*slots_NK.shape, width)


@triton.jit
def power_of_two(exponent):
    """float32, exactly, of an int32 exponent in -126 … 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def write_coded_kernel(
    latent, rope, codes, keys, scales, slots, stride_latent, stride_rope,
    C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, STRIDE_CODES: tl.constexpr, STRIDE_VALUES: tl.constexpr,
    CODED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tokens into their slots, as `quantise` of cache_rows.py says it. STRIDE_*: of blocks. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    block, place = slot // SIZE, slot % SIZE
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    x = tl.load(latent + row * stride_latent + c, mask=c < C, other=0.0).to(tl.float32)
    # Of magnitudes, the bits are in the order of the values; those that are not finite come last.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    exponent = (largest >> 23) - 127 - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 = 1.75 × 2^8
    finite = largest < 0x7F800000
    exponent = tl.where(finite, tl.maximum(exponent, LEAST), 0)
    code = (x * power_of_two(-exponent)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    code = tl.where(finite, code, NAN)
    tl.store(codes + block * STRIDE_CODES + place * CODED + c, code, mask=c < C)
    key = tl.load(rope + row * stride_rope + r, mask=r < R)
    tl.store(keys + block * STRIDE_VALUES + place * R + r, key, mask=r < R)
    tl.store(scales + block * STRIDE_VALUES + place, power_of_two(exponent).to(scales.dtype.element_ty))


@triton.jit
def read_coded_kernel(
    codes, keys, scales, slots, out,
    C: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, STRIDE_CODES: tl.constexpr, STRIDE_VALUES: tl.constexpr,
    CODED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [rows, C + R]: tokens as a plain cache has them. Code × scale is exact in out's dtype. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    block, place = slot // SIZE, slot % SIZE
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    code = tl.load(codes + block * STRIDE_CODES + place * CODED + c, mask=c < C, other=0)
    scale = tl.load(scales + block * STRIDE_VALUES + place).to(tl.float32)
    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    tl.store(out + row * (C + R) + c, value.to(out.dtype.element_ty), mask=c < C)
    key = tl.load(keys + block * STRIDE_VALUES + place * R + r, mask=r < R)
    tl.store(out + row * (C + R) + C + r, key, mask=r < R)
