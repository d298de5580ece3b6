"""route: the gate's product in float32, and the choice of experts.

The product is split over D at fixed places, because a gate has few outputs; route_select_kernel adds the parts in
order. A bfloat16 input is exact in a tensor core, and a float32 weight is exactly the sum of three bfloat16 ones (24
bits in three times 8), so three products give float32 scores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def route_scores_kernel(
    x, weight, partial, rows, E, D, stride_x,
    D_SPLIT: tl.constexpr, EVEN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[s, t, e] = Σ over D's part s of weight[e, d] · x[t, d], float32. Grid: (⌈E / BLOCK_E⌉, ⌈rows / BLOCK_T⌉,
    parts)."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    x_rows = t.to(tl.int64) * stride_x
    for d0 in range(split * D_SPLIT, tl.minimum((split + 1) * D_SPLIT, D), BLOCK_D):
        x_mask = (t < rows)[:, None]
        w_mask = (e < E)[:, None]
        if not EVEN:
            x_mask = x_mask & ((d0 + d) < D)[None, :]
            w_mask = w_mask & ((d0 + d) < D)[None, :]
        values = tl.load(x + x_rows[:, None] + (d0 + d)[None, :], mask=x_mask, other=0.0)
        w = tl.load(weight + e[:, None] * D + (d0 + d)[None, :], mask=w_mask, other=0.0)
        if values.dtype == tl.bfloat16:
            high = w.to(tl.bfloat16)
            rest = w - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(low, tl.trans(values), acc)
            acc = tl.dot(middle, tl.trans(values), acc)
            acc = tl.dot(high, tl.trans(values), acc)
        else:
            acc = tl.dot(w, tl.trans(values), acc, input_precision="ieee")
    place = (split * rows + t).to(tl.int64) * E
    tl.store(partial + place[:, None] + e[None, :], tl.trans(acc), mask=(t < rows)[:, None] & (e < E)[None, :])


@triton.jit
def take_largest(value, free, index, END: tl.constexpr):
    """(index of the largest free value, the lowest of equal ones; the value)."""
    best = tl.max(tl.where(free, value, float("-inf")), 0)
    return tl.min(tl.where(free & (value == best), index, END), 0), best


@triton.jit(do_not_specialize=["rows"])
def route_select_kernel(
    partial, bias, ids, weights, rows, scaling, E, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, KEPT: tl.constexpr,
    TOP: tl.constexpr, NORMALISE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """ids int32 and weights float32 [rows, TOP] of one row, ascending by id. Grid: (rows,). NaN scores count as the
    smallest."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    real = (g < GROUPS) & (s < GROUP_SIZE)
    e = tl.where(real, g * GROUP_SIZE + s, 0)
    logit = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    for split in tl.static_range(SPLITS):
        logit += tl.load(partial + (split * rows + row) * E + e, mask=real, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    biased = score + tl.load(bias + e, mask=real, other=0.0)
    biased = tl.where(real & (biased == biased), biased, float("-inf"))

    # A group's score is the sum of its two largest; of a group of one, that one.
    first = tl.max(biased, 1)
    group_score = first
    if GROUP_SIZE > 1:
        at_first = tl.min(tl.where(biased == first[:, None], s, BLOCK_S), 1)
        group_score = first + tl.max(tl.where(s == at_first[:, None], float("-inf"), biased), 1)
    group = tl.arange(0, BLOCK_G)
    group_free = group < GROUPS
    for _ in tl.static_range(KEPT):
        chosen, _best = take_largest(group_score, group_free, group, BLOCK_G)
        group_free = group_free & (group != chosen)
    allowed = real & (((group < GROUPS) & (group_free == 0))[:, None])
    candidates = tl.reshape(tl.where(allowed, biased, float("-inf")), [BLOCK_G * BLOCK_S])
    expert = tl.reshape(tl.where(real, e, E), [BLOCK_G * BLOCK_S])
    free = expert < E
    for _ in tl.static_range(TOP):
        chosen, _best = take_largest(candidates, free, expert, 1 << 30)
        free = free & (expert != chosen)
    taken = (expert < E) & (free == 0)
    picked = tl.where(taken, tl.reshape(score, [BLOCK_G * BLOCK_S]), 0.0)
    if NORMALISE:
        picked = picked / (tl.sum(picked, 0) + 1e-20)
    place = row * TOP + tl.cumsum(taken.to(tl.int32), 0) - 1  # ids rise with the place in the block
    tl.store(ids + place, expert, mask=taken)
    tl.store(weights + place, picked * scaling, mask=taken)
