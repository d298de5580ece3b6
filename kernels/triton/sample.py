"""sample: the largest of logit / temperature + Gumbel noise among the tokens that top-k and top-p leave.

The noise is `gumbel_noise` of kernels/reference.py: splitmix64's finaliser on unsigned 64-bit integers, exactly, then
two float64 logarithms, which may differ from torch's in the last place. Values are compared in float64, and the first
of equal ones wins.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def mix(z):
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def gumbel(seed, index, ids):
    """float64 noise of token `ids` (int64) as the index-th token of the request with this seed (both int64 scalars)."""
    key = mix(seed.to(tl.uint64, bitcast=True) + GOLDEN)
    key = mix(key + (index + 1).to(tl.uint64, bitcast=True) * GOLDEN)
    bits = mix(key + ids.to(tl.uint64, bitcast=True) * GOLDEN)
    uniform = ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2⁻⁵³
    return -tl.log(-tl.log(uniform))


@triton.jit
def first_largest(value, place, END: tl.constexpr):
    """(largest value, lowest place of equal ones)."""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, place, END), 0)


@triton.jit
def sample_chunk_kernel(logits, temperature, seed, index, best_value, best_id, V, stride, chunks, BLOCK: tl.constexpr):
    """The best of BLOCK tokens of a row, without top-k and top-p. Grid: (rows, chunks). best_value float64, best_id
    int64 [rows, chunks]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * stride + ids, mask=ids < V, other=float("-inf"))
    heat = tl.load(temperature + row)
    if heat > 0:
        scaled = tl.div_rn(logit, tl.full([BLOCK], 1.0, tl.float32) * heat.to(tl.float32)).to(tl.float64)
        value = scaled + gumbel(tl.load(seed + row), tl.load(index + row), ids.to(tl.int64))
    else:
        value = logit.to(tl.float64)
    best, at = first_largest(tl.where(ids < V, value, float("-inf")), ids, 1 << 30)
    tl.store(best_value + row * chunks + chunk, best)
    tl.store(best_id + row * chunks + chunk, tl.minimum(at, V - 1).to(tl.int64))


@triton.jit
def sample_merge_kernel(best_value, best_id, out, chunks, BLOCK: tl.constexpr):
    """The best of a row's chunks. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    value = tl.load(best_value + row * chunks + c, mask=c < chunks, other=float("-inf"))
    _best, at = first_largest(value, c, BLOCK)
    tl.store(out + row, tl.load(best_id + row * chunks + tl.minimum(at, chunks - 1)))


@triton.jit
def sample_filtered_kernel(scaled, ids, rows_of, top_p, top_k, seed, index, out, V, BLOCK: tl.constexpr):
    """One row with top-k or top-p. Grid: (filtered rows,).

    scaled float32, ids int64 [filtered rows, V]: logits / temperature, sorted down, equal ones by id, and their tokens.
    rows_of int64: the row of the step that each is. Softmax and its running sum are float64, in an order that nothing
    but V changes.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_of + program)
    scaled += program * V
    ids += program * V
    i = tl.arange(0, BLOCK)
    limit = tl.load(top_k + row)
    count = tl.where((limit > 0) & (limit < V), limit, V).to(tl.int32)
    top = tl.load(scaled).to(tl.float64)
    p = tl.load(top_p + row)
    keep = count
    if p < 1.0:
        total = tl.zeros([], tl.float64)
        for first in range(0, count, BLOCK):
            mask = first + i < count
            value = tl.load(scaled + first + i, mask=mask, other=float("-inf")).to(tl.float64)
            total += tl.sum(tl.where(mask, tl.exp(value - top), 0.0), 0)
        running = tl.zeros([], tl.float64)
        below = tl.zeros([], tl.int32)
        for first in range(0, count, BLOCK):
            mask = first + i < count
            value = tl.load(scaled + first + i, mask=mask, other=float("-inf")).to(tl.float64)
            share = tl.where(mask, tl.exp(value - top) / total, 0.0)
            reached = running + tl.cumsum(share, 0)
            below += tl.sum((mask & (reached < p)).to(tl.int32), 0)
            running += tl.sum(share, 0)
        keep = tl.minimum(below + 1, count)
    best = tl.full([], float("-inf"), tl.float64)
    chosen = tl.load(ids)
    seed_value = tl.load(seed + row)
    index_value = tl.load(index + row)
    for first in range(0, keep, BLOCK):
        mask = first + i < keep
        token = tl.load(ids + first + i, mask=mask, other=0)
        value = tl.load(scaled + first + i, mask=mask, other=float("-inf")).to(tl.float64) + gumbel(
            seed_value, index_value, token
        )
        here, at = first_largest(tl.where(mask, value, float("-inf")), first + i, 1 << 30)
        if here > best:
            best = here
            chosen = tl.load(ids + at)
    tl.store(out + row, chosen)
