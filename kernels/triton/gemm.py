"""Products with one weight: linear, head_linear and the fused gate·up of an MLP. See the package's docstring for why
the weight is on the left.

Rows lie in BLOCK_T columns of a tile, outputs in BLOCK_N rows. Packed weights have padded rows and columns
(weights.py), so only the input is masked. FP8 weights are widened in registers; the partial sum over each 128 of K is
scaled by the float32 scale of its block. Integers likewise, by group: integers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from isotherm.kernels.triton.integers import integer_product
from isotherm.kernels.triton.launch import power_of_two


@dataclass(frozen=True)
class Tile:
    """BLOCK_T rows by BLOCK_N outputs by BLOCK_K inputs."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def choose_tile(rows: int, scaled: int, largest: int = 128) -> Tile:
    """From memory-bound few rows (many small programs, deep pipelines) to compute-bound many. `scaled`: inputs
    that share a scale, 0 where there are none. No choice here changes a bit of the result."""
    block_t = min(largest, max(16, power_of_two(min(rows, 128))))
    if block_t == 128:
        return Tile(128, 128, 128, 8, 3) if scaled > 64 else Tile(128, 128, 64, 8, 4)  # small groups would spill at 128
    return Tile(block_t, 64, 128 if scaled else 64, 4, 4 if scaled else 5)


@triton.jit
def tile_product(
    x, x_offsets, x_mask, w, w_offsets, scale, scale_offsets, zeros, stride_w, stride_scale, k_first, k_last, K,
    FP8: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_T]: Σ over k_first ≤ k < k_last of w[n, k] · x[t, k]. Offsets are those of row starts, in
    elements. GROUP: inputs that share a scale, of integers; then scale_offsets are the rows themselves. 0: others."""
    if GROUP:
        return integer_product(
            x, x_offsets, x_mask, w, scale_offsets, scale, zeros, stride_w, stride_scale, k_first, k_last, K,
            GROUP, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for k0 in range(k_first, k_last, BLOCK_K):
        if EVEN_K:
            rows = tl.load(x + x_offsets[:, None] + (k0 + k)[None, :], mask=x_mask[:, None], other=0.0)
        else:
            rows = tl.load(
                x + x_offsets[:, None] + (k0 + k)[None, :], mask=x_mask[:, None] & ((k0 + k) < K)[None, :], other=0.0
            )
        weight = tl.load(w + w_offsets[:, None] + (k0 + k)[None, :])
        if FP8:
            tl.static_assert(BLOCK_K == 128, "one scale per 128 of K")
            factor = tl.load(scale + scale_offsets + k0 // 128)
            part = tl.dot(weight.to(rows.dtype), tl.trans(rows), input_precision="ieee")
            acc = tl.fma(part, factor[:, None], acc)
        else:
            acc = tl.dot(weight.to(rows.dtype), tl.trans(rows), acc, input_precision="ieee")
    return acc


@triton.jit
def tile_place(program, rows, columns, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """(row tile, output tile) of a program. TOGETHER row tiles take an output tile in turn, so that what runs together
    shares weights in L2."""
    row_tiles = tl.cdiv(rows, BLOCK_T)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    first = program // (TOGETHER * column_tiles) * TOGETHER
    size = tl.minimum(row_tiles - first, TOGETHER)
    place = program - first * column_tiles
    return first + place % size, place // size


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, index, w, scale, scale_rows, zeros, bias, out, rows, N, K,
    stride_x, stride_w, stride_scale, stride_out, head_x, head_w, head_out,
    K_SPLIT: tl.constexpr, SPLITS: tl.constexpr, PARTIAL: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[t, n] = Σ_k w[n, k] · x[index[t] or t, k] + bias[n]. Grid: (tiles, SPLITS if PARTIAL else 1, heads).

    K is summed in SPLITS parts of K_SPLIT, which are added in order. With PARTIAL each program writes one part,
    float32, to out [SPLITS, rows, N], and finish_kernel adds them. Without, each program goes through all of them. Both
    give the same bits.
    """
    tile_t, tile_n = tile_place(tl.program_id(0), rows, N, BLOCK_T, BLOCK_N, TOGETHER)
    head = tl.program_id(2)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    t_mask = t < rows
    if index is not None:  # noqa: SIM108 - a conditional expression would load in both cases
        source = tl.load(index + t, mask=t_mask, other=0).to(tl.int64)
    else:
        source = t.to(tl.int64)
    w_base = w
    if not GROUP:
        w_base += head.to(tl.int64) * head_w + (tile_n * BLOCK_N).to(tl.int64) * stride_w
    w_offsets = tl.arange(0, BLOCK_N) * stride_w
    scale_offsets = n
    if FP8:
        scale_offsets = tl.load(scale_rows + n) * stride_scale
    x_base = x + head.to(tl.int64) * head_x
    if SPLITS == 1:
        total = tile_product(
            x_base, source * stride_x, t_mask, w_base, w_offsets, scale, scale_offsets, zeros, stride_w,
            stride_scale, 0, K, K, FP8, GROUP, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        first = 0
        last = SPLITS
        if PARTIAL:
            first = tl.program_id(1)
            last = first + 1
        for split in range(first, last):
            total += tile_product(
                x_base, source * stride_x, t_mask, w_base, w_offsets, scale, scale_offsets, zeros, stride_w,
                stride_scale, split * K_SPLIT, tl.minimum((split + 1) * K_SPLIT, K), K, FP8, GROUP, EVEN_K, BLOCK_N,
                BLOCK_T, BLOCK_K,
            )  # fmt: skip
    mask = t_mask[:, None] & (n < N)[None, :]
    if PARTIAL:
        place = (tl.program_id(1) * rows + t).to(tl.int64) * N
        tl.store(out + place[:, None] + n[None, :], tl.trans(total), mask=mask)
    else:
        if bias is not None:
            total += tl.load(bias + n, mask=n < N, other=0.0)[:, None]
        place = t.to(tl.int64) * stride_out + head.to(tl.int64) * head_out
        tl.store(out + place[:, None] + n[None, :], tl.trans(total).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(partial, bias, out, rows, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, n] = Σ_s partial[s, t, n], in the order of s, + bias[n]. Grid: (rows, ⌈N / BLOCK⌉)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (split * rows + row) * N + n, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=mask, other=0.0)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(acc, HALF: tl.constexpr, BLOCK_T: tl.constexpr):
    """float32 [2 · HALF, BLOCK_T], gate rows above up rows → SiLU(gate) · up, [HALF, BLOCK_T]."""
    gate, up = tl.split(tl.permute(tl.reshape(acc, [2, HALF, BLOCK_T]), [1, 2, 0]))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["rows"])
def gate_up_kernel(
    x, w, scale, scale_rows, zeros, bias, out, rows, N, K, stride_x, stride_w, stride_scale, stride_out,
    FP8: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[t, n] = SiLU(Σ_k w[n, k] · x[t, k]) · Σ_k w[N + n, k] · x[t, k], for N outputs. Grid: (tiles,).

    One tile product has HALF gate rows above their HALF up rows, so that a row of the input is read once for both.
    """
    tile_t, tile_n = tile_place(tl.program_id(0), rows, N, BLOCK_T, HALF, TOGETHER)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t < rows
    i = tl.arange(0, 2 * HALF)
    n = tile_n * HALF + i % HALF
    row = tl.where(n < N, n + (i // HALF) * N, 0)  # outputs past the last take some row's product, and are not stored
    scale_offsets = row
    if FP8:
        scale_offsets = tl.load(scale_rows + row) * stride_scale
    acc = tile_product(
        x, t.to(tl.int64) * stride_x, t_mask, w, row.to(tl.int64) * stride_w, scale, scale_offsets, zeros,
        stride_w, stride_scale, 0, K, K, FP8, GROUP, EVEN_K, 2 * HALF, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + row)[:, None]
    column = tile_n * HALF + tl.arange(0, HALF)
    out_tile = tl.trans(silu_mul(acc, HALF, BLOCK_T)).to(out.dtype.element_ty)
    tl.store(
        out + t.to(tl.int64)[:, None] * stride_out + column[None, :],
        out_tile,
        mask=t_mask[:, None] & (column < N)[None, :],
    )
