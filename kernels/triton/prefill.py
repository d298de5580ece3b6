"""mla_prefill's attention over one segment of expanded keys and values (the "MHA form" of arXiv:2405.04434: each head
has its own key and value).

Keys are taken in tiles of BLOCK_L positions counted from 0, by rows in tiles of BLOCK_T. A long context is expanded in
segments, to bound the workspace; between segments a row's running maximum, sum and output wait in float32, which loses
nothing. So neither the cut of a prompt into chunks nor that of a context into segments changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    q, qr, expanded, cache, slots, position_t, first, last, segment, length, stride_kv, factor, largest, total, acc,
    C: tl.constexpr, R: tl.constexpr, NOPE: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles first … last-1. CAUSAL: some key of a tile may lie after some row."""
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    v = tl.arange(0, BLOCK_V)
    for begin in range(first, last, BLOCK_L):
        position = begin + tl.arange(0, BLOCK_L)
        present = position < length
        slot = tl.load(slots + position, mask=present, other=0)
        place = (position - segment)[:, None] * stride_kv
        key_mask = present[:, None]
        rope_mask = present[:, None]
        value_mask = present[:, None]
        if not EVEN:
            key_mask = present[:, None] & (n < NOPE)[None, :]
            rope_mask = present[:, None] & (r < R)[None, :]
            value_mask = present[:, None] & (v < V)[None, :]
        key = tl.load(expanded + place + n[None, :], mask=key_mask, other=0.0)
        rope = tl.load(cache + slot[:, None] * (C + R) + (C + r)[None, :], mask=rope_mask, other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision="ieee")
        score = tl.dot(qr, tl.trans(rope), score, input_precision="ieee")
        if CAUSAL:
            score = tl.where(position[None, :] <= position_t[:, None], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1) * factor)
        shrink = tl.exp2(largest - larger)
        weight = tl.exp2(tl.fma(score, factor, -larger[:, None]))
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        acc = acc * shrink[:, None]
        value = tl.load(expanded + place + (NOPE + v)[None, :], mask=value_mask, other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        largest = larger
    return largest, total, acc


@triton.jit(do_not_specialize=["rows", "start", "segment", "segment_end"])
def mla_prefill_kernel(
    q, expanded, cache, slots, state_acc, state_ml, out, scale, rows, start, segment, segment_end,
    stride_qt, stride_qh, stride_kv, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, NOPE: tl.constexpr,
    V: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Rows at positions start … start+rows-1 against keys segment … segment_end-1. Grid: (⌈rows / BLOCK_T⌉, H).

    q [T, H, NOPE + R]; expanded [keys of the segment, H × (NOPE + V)]; slots int32: where each position lies in the
    cache; out [T, H, V]. state_acc float32 [T, H, V] and state_ml float32 [2, T, H] are read unless FIRST and written
    unless LAST. segment is a multiple of BLOCK_L.
    """
    # Tiles with the most keys first, so that the short ones fill the end of the launch.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t < rows
    position_t = start + t
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    v = tl.arange(0, BLOCK_V)
    q_place = t.to(tl.int64)[:, None] * stride_qt + head * stride_qh
    q_nope = tl.load(q + q_place + n[None, :], mask=t_mask[:, None] & (n < NOPE)[None, :], other=0.0)
    q_rope = tl.load(q + q_place + (NOPE + r)[None, :], mask=t_mask[:, None] & (r < R)[None, :], other=0.0)
    state = t.to(tl.int64) * H + head
    v_mask = t_mask[:, None] & (v < V)[None, :]
    if FIRST:
        largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    else:
        largest = tl.load(state_ml + state, mask=t_mask, other=0.0)
        total = tl.load(state_ml + rows.to(tl.int64) * H + state, mask=t_mask, other=1.0)
        acc = tl.load(state_acc + state[:, None] * V + v[None, :], mask=v_mask, other=0.0)
    factor = scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has
    seen_by_all = start + tile * BLOCK_T + 1
    seen_by_one = tl.minimum(start + (tile + 1) * BLOCK_T, start + rows)
    middle = tl.maximum(tl.minimum(seen_by_all, segment_end) // BLOCK_L * BLOCK_L, segment)
    last = tl.minimum(seen_by_one, segment_end)
    kv = expanded + head * (NOPE + V)
    largest, total, acc = attend(
        q_nope, q_rope, kv, cache, slots, position_t, segment, middle, segment, segment_end, stride_kv, factor,
        largest, total, acc, C, R, NOPE, V, False, EVEN, BLOCK_L, BLOCK_N, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    largest, total, acc = attend(
        q_nope, q_rope, kv, cache, slots, position_t, middle, last, segment, segment_end, stride_kv, factor,
        largest, total, acc, C, R, NOPE, V, True, EVEN, BLOCK_L, BLOCK_N, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    if LAST:
        tl.store(out + state[:, None] * V + v[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=v_mask)
    else:
        tl.store(state_ml + state, largest, mask=t_mask)
        tl.store(state_ml + rows.to(tl.int64) * H + state, total, mask=t_mask)
        tl.store(state_acc + state[:, None] * V + v[None, :], acc, mask=v_mask)
