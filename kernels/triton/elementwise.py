"""rms_norm, rope, combine and write_cache: memory-bound, one pass each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, residual, weight, out, D, stride_x, eps, BLOCK: tl.constexpr):
    """out[t] = x[t] / sqrt(mean(x[t]²) + eps), rounded, × weight. With a residual: residual += x, rounded, in place,
    and its norm. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    value = tl.load(x + row * stride_x + d, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    if residual is not None:
        value = (tl.load(residual + row * D + d, mask=mask, other=0.0).to(tl.float32) + value).to(dtype)
        tl.store(residual + row * D + d, value, mask=mask)
        value = value.to(tl.float32)
    normal = (value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)).to(dtype).to(tl.float32)
    tl.store(
        out + row * D + d, (tl.load(weight + d, mask=mask, other=0.0).to(tl.float32) * normal).to(dtype), mask=mask
    )


@triton.jit
def rope_kernel(
    x, cos, sin, out, H, stride_xt, stride_xh, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Pairs (x[2i], x[2i+1]) turned by the angle of (row, i). Grid: (rows, ⌈H / BLOCK_H⌉). out [T, H, 2 · PAIRS]."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, 2 * BLOCK_P)
    mask = (h < H)[:, None] & (i < 2 * PAIRS)[None, :]
    value = tl.load(x + row * stride_xt + h[:, None] * stride_xh + i[None, :], mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [BLOCK_H, BLOCK_P, 2]))
    p = tl.arange(0, BLOCK_P)
    c = tl.load(cos + row * PAIRS + p, mask=p < PAIRS, other=0.0)[None, :]
    s = tl.load(sin + row * PAIRS + p, mask=p < PAIRS, other=0.0)[None, :]
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_H, 2 * BLOCK_P])
    tl.store(out + (row * H + h[:, None]) * 2 * PAIRS + i[None, :], turned.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(y, index, weights, out, D, stride_y, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ_j weights[t, j] · y[index[t, j]], float32, in the order of j. Grid: (rows, ⌈D / BLOCK⌉)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < D
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP):
        source = tl.load(index + row * TOP + j).to(tl.int64)
        total += tl.load(y + source * stride_y + d, mask=mask, other=0.0).to(tl.float32) * tl.load(
            weights + row * TOP + j
        )
    tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def write_cache_kernel(latent, rope, cache, slots, C, R, stride_latent, stride_rope, BLOCK: tl.constexpr):
    """cache[slots[t]] = latent[t] then rope[t]. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    entry = cache + tl.load(slots + row) * (C + R)
    tl.store(entry + i, tl.load(latent + row * stride_latent + i, mask=i < C), mask=i < C)
    tl.store(entry + C + i, tl.load(rope + row * stride_rope + i, mask=i < R), mask=i < R)
