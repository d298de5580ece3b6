"""Products of sorted rows with many experts' weights: gate·up with SiLU·mul, then down.

Pairs offsets[a] … offsets[a+1]-1 use the expert in slots[a]. A program finds its expert from the offsets, on the
device: the host knows only how many pairs and experts there are, launches as many programs as they may need, and waits
for nothing. Weights are reached through tables of addresses by slot, since slots are filled and emptied one by one.
Experts that are stored in another form than a launch is for are left to another one. An empty slot's pairs get NaN,
never another expert's output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isotherm.kernels.triton.gemm import silu_mul, tile_product


@triton.jit
def find_tile(offsets, active, tile, BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr):
    """(a, first pair, end of the expert's pairs) of a row tile when each expert's pairs are cut in tiles of BLOCK_T; a
    = active past the last."""
    a = tl.arange(0, BLOCK_A)
    begin = tl.load(offsets + a, mask=a < active, other=0)
    end = tl.load(offsets + a + 1, mask=a < active, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_T)
    tile_end = tl.cumsum(tiles, 0)
    # Experts before the one that holds `tile`. Lanes past the last expert have no tiles, and repeat the last end.
    found = tl.sum(((tile_end <= tile) & (a < active)).to(tl.int32), 0)
    here = (a == found) & (a < active)
    first = tl.sum(tl.where(here, begin + (tile - tile_end + tiles) * BLOCK_T, 0), 0)
    return found, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit(do_not_specialize=["active", "form"])
def expert_gate_up_kernel(
    x, pair_rows, slots, offsets, forms, table, scale_table, zero_table, scale_rows, out, active, form, N, K,
    stride_x, stride_w, stride_scale, WEIGHT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
    EMPTY: tl.constexpr,
):  # fmt: skip
    """out[p, n] = SiLU(gate) · up of pair p, for N = inner outputs, of experts in the form `form`; with EMPTY, NaN for
    empty slots. Grid: (row tiles × ⌈N / HALF⌉,)."""
    FP8: tl.constexpr = tl.float8e4nv == WEIGHT
    column_tiles = tl.cdiv(N, HALF)
    tile_n = tl.program_id(0) % column_tiles
    a, first, end = find_tile(offsets, active, tl.program_id(0) // column_tiles, BLOCK_A, BLOCK_T)
    if a >= active:
        return
    p = first + tl.arange(0, BLOCK_T)
    p_mask = p < end
    column = tile_n * HALF + tl.arange(0, HALF)
    mask = p_mask[:, None] & (column < N)[None, :]
    place = p.to(tl.int64)[:, None] * N + column[None, :]
    slot = tl.load(slots + a)
    here = tl.load(forms + slot)
    if here != form:
        if EMPTY and here < 0:
            empty = tl.full([BLOCK_T, HALF], float("nan"), tl.float32).to(out.dtype.element_ty)
            tl.store(out + place, empty, mask=mask)
        return
    w = tl.multiple_of(tl.load(table + slot).to(tl.pointer_type(WEIGHT)), 16)
    scale = tl.load(scale_table + slot).to(tl.pointer_type(SCALE))
    zeros = None
    if zero_table is not None:
        zeros = tl.load(zero_table + slot).to(tl.pointer_type(tl.uint8))
    i = tl.arange(0, 2 * HALF)
    n = tile_n * HALF + i % HALF
    row = tl.where(n < N, n + (i // HALF) * N, 0)
    scale_offsets = row
    if FP8:
        scale_offsets = tl.load(scale_rows + row) * stride_scale
    source = tl.load(pair_rows + p, mask=p_mask, other=0).to(tl.int64)
    acc = tile_product(
        x, source * stride_x, p_mask, w, row * stride_w, scale, scale_offsets, zeros, stride_w, stride_scale,
        0, K, K, FP8, GROUP, EVEN_K, 2 * HALF, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    tl.store(out + place, tl.trans(silu_mul(acc, HALF, BLOCK_T)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["active", "form"])
def expert_down_kernel(
    h, slots, offsets, forms, table, scale_table, zero_table, scale_rows, out, active, form, N, K, stride_w,
    stride_scale, WEIGHT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    """out[p, n] = Σ_k w[n, k] · h[p, k], for N = hidden outputs; of which experts, as above. Grid: (row tiles ×
    ⌈N / BLOCK_N⌉,)."""
    FP8: tl.constexpr = tl.float8e4nv == WEIGHT
    column_tiles = tl.cdiv(N, BLOCK_N)
    tile_n = tl.program_id(0) % column_tiles
    a, first, end = find_tile(offsets, active, tl.program_id(0) // column_tiles, BLOCK_A, BLOCK_T)
    if a >= active:
        return
    p = first + tl.arange(0, BLOCK_T)
    p_mask = p < end
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = p_mask[:, None] & (n < N)[None, :]
    place = p.to(tl.int64)[:, None] * N + n[None, :]
    slot = tl.load(slots + a)
    here = tl.load(forms + slot)
    if here != form:
        if EMPTY and here < 0:
            empty = tl.full([BLOCK_T, BLOCK_N], float("nan"), tl.float32).to(out.dtype.element_ty)
            tl.store(out + place, empty, mask=mask)
        return
    w = tl.multiple_of(tl.load(table + slot).to(tl.pointer_type(WEIGHT)), 16)
    scale = tl.load(scale_table + slot).to(tl.pointer_type(SCALE))
    zeros = None
    if zero_table is not None:
        zeros = tl.load(zero_table + slot).to(tl.pointer_type(tl.uint8))
    scale_offsets = n
    if FP8:
        scale_offsets = tl.load(scale_rows + n) * stride_scale
    acc = tile_product(
        h, p.to(tl.int64) * K, p_mask, w, n * stride_w, scale, scale_offsets, zeros, stride_w, stride_scale,
        0, K, K, FP8, GROUP, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    tl.store(out + place, tl.trans(acc).to(out.dtype.element_ty), mask=mask)
