"""mla_decode: absorbed attention over the paged latent cache (arXiv:2405.04434, §2.1.2: one latent serves every head as
key and as value).

A program takes BLOCK_H heads of one row, which share each latent that it reads, over one split of SPLIT positions
counted from 0. Where no table is longer than a split, rows are finished in place; else merge_kernel adds their splits
in order. A row's splits depend on its own length alone.

Of a cache in FP8 (coded_cache.py) the codes are widened in registers, and their scales applied to what they are
multiplied with: the scores, and the weights of the softmax. Scales are powers of two, so that this gives the bits of a
plain cache of the same latents, and spares the registers of a product for each latent.

On 8 warps Triton 3.7 lets both warpgroups compute all scores of a tile (it gives the warps of a product that feeds
another one to rows alone), so the first product is done twice; only the second is shared out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["splits"])
def mla_decode_kernel(
    q_latent, q_rope, cache, keys, scales, tables, sequence, lengths, out, partial, partial_ml, scale, splits,
    stride_qt, stride_qh, stride_rt, stride_rh, stride_table,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE_CODES: tl.constexpr,
    STRIDE_VALUES: tl.constexpr, CODED: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (rows × ⌈H / BLOCK_H⌉, splits). out [T, H, C]; partial float32 [T, splits, H, C], not normalised, and
    partial_ml float32 [T, splits, 2, H]: the largest score (in units of log 2) and the sum of exponentials. EVEN: H, C
    and R fill their blocks. `cache` in `dtype`, keys and scales None; or the planes of one in FP8."""
    blocks_h = tl.cdiv(H, BLOCK_H)
    row = tl.program_id(0) // blocks_h
    split = tl.program_id(1)
    length = tl.load(lengths + row)
    begin = split * SPLIT
    if begin >= length:
        return
    end = tl.minimum(begin + SPLIT, length)
    h = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    row64 = row.to(tl.int64)
    q_at = q_latent + row64 * stride_qt + h[:, None] * stride_qh + c[None, :]
    qr_at = q_rope + row64 * stride_rt + h[:, None] * stride_rh + r[None, :]
    if EVEN:
        q = tl.load(q_at)
        qr = tl.load(qr_at)
    else:
        q = tl.load(q_at, mask=(h < H)[:, None] & (c < C)[None, :], other=0.0)
        qr = tl.load(qr_at, mask=(h < H)[:, None] & (r < R)[None, :], other=0.0)
    table = tables + tl.load(sequence + row).to(tl.int64) * stride_table
    factor = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has

    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for first in range(begin, end, BLOCK_L):
        position = first + tl.arange(0, BLOCK_L)
        seen = position < end
        # A tile lies in one block: one address, and its rows' are known from it, which spares registers
        if BLOCK_SIZE % BLOCK_L == 0:
            block = tl.load(table + first // BLOCK_SIZE)
            base = block * BLOCK_SIZE + first % BLOCK_SIZE
            entry = base * (C + R) + tl.arange(0, BLOCK_L) * (C + R)
            place = first % BLOCK_SIZE + tl.arange(0, BLOCK_L)
        else:
            if scales is not None and BLOCK_L % BLOCK_SIZE == 0:  # an address for each block: more would spill
                b = tl.arange(0, BLOCK_L // BLOCK_SIZE)
                block = tl.load(table + first // BLOCK_SIZE + b, mask=first + b * BLOCK_SIZE < end, other=0)
                block = tl.reshape(tl.broadcast_to(block[:, None], [BLOCK_L // BLOCK_SIZE, BLOCK_SIZE]), [BLOCK_L])
            else:
                block = tl.load(table + position // BLOCK_SIZE, mask=seen, other=0)
            # Not their sum times C + R: Triton 3.6 takes that for aligned as a block's first row is, on all its rows
            entry = block * (BLOCK_SIZE * (C + R)) + position % BLOCK_SIZE * (C + R)
            place = position % BLOCK_SIZE
        # What no row has written may be NaN: it is never read.
        latent_mask = seen[:, None]
        rope_mask = seen[:, None]
        if not EVEN:
            latent_mask = seen[:, None] & (c < C)[None, :]
            rope_mask = seen[:, None] & (r < R)[None, :]
        if scales is None:
            latent = tl.load(cache + entry[:, None] + c[None, :], mask=latent_mask, other=0.0)
            key = tl.load(cache + entry[:, None] + (C + r)[None, :], mask=rope_mask, other=0.0)
            score = tl.dot(q, tl.trans(latent), input_precision="ieee")
        else:
            at = block * STRIDE_CODES + place * CODED
            code = tl.load(cache + at[:, None] + c[None, :], mask=latent_mask, other=0)
            latent = code.to(tl.float8e4nv, bitcast=True).to(q.dtype)
            at = block * STRIDE_VALUES + place * R
            key = tl.load(keys + at[:, None] + r[None, :], mask=rope_mask, other=0.0)
            latent_scale = tl.load(scales + block * STRIDE_VALUES + place, mask=seen, other=0.0).to(tl.float32)
            score = tl.dot(q, tl.trans(latent), input_precision="ieee") * latent_scale[None, :]
        score = tl.dot(qr, tl.trans(key), score, input_precision="ieee")
        score = tl.where(seen[None, :], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1) * factor)
        shrink = tl.exp2(largest - larger)
        weight = tl.exp2(tl.fma(score, factor, -larger[:, None]))
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        acc = acc * shrink[:, None]
        if scales is not None:
            weight = weight * latent_scale[None, :]
        acc = tl.dot(weight.to(latent.dtype), latent, acc, input_precision="ieee")
        largest = larger
    if partial is None:
        value = (acc / total[:, None]).to(out.dtype.element_ty)
        target = out + row64 * H * C
    else:
        value = acc
        part = row64 * splits + split
        target = partial + part * H * C
        tl.store(partial_ml + part * 2 * H + h, largest, mask=h < H)
        tl.store(partial_ml + (part * 2 + 1) * H + h, total, mask=h < H)
    target_at = target + h[:, None] * C + c[None, :]
    if EVEN:
        tl.store(target_at, value)
    else:
        tl.store(target_at, value, mask=(h < H)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    lengths, partial, partial_ml, out, splits,
    H: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds a row's splits in order, each weighted by its share of the softmax. Grid: (rows, H).

    A row of one split comes out as mla_decode_kernel would have finished it itself: its share is exactly one, added to
    exact zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    count = tl.cdiv(tl.load(lengths + row), SPLIT)
    c = tl.arange(0, BLOCK_C)
    largest = float("-inf")
    for split in range(0, count):
        largest = tl.maximum(largest, tl.load(partial_ml + (row * splits + split) * 2 * H + h))
    total = 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for split in range(0, count):
        part = row * splits + split
        share = tl.exp2(tl.load(partial_ml + part * 2 * H + h) - largest)
        total += share * tl.load(partial_ml + (part * 2 + 1) * H + h)
        acc += share * tl.load(partial + (part * H + h) * C + c, mask=c < C, other=0.0)
    tl.store(out + (row * H + h) * C + c, (acc / total).to(out.dtype.element_ty), mask=c < C)
