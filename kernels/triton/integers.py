"""The product with a weight of grouped integers (int4, int8): the sum of each group apart, then added with the group's
scale, as the native kernels do it.

A code less its zero point is exact in bfloat16, so that the tensor core multiplies the very integers. They are widened
in registers. As integer_weights.py lays them out, a run of 32 inputs of an output is 32 bytes, or their low or high
halves: no lane has to be moved, and each run has one scale for an output.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUN = tl.constexpr(32)  # no group is smaller, and each is a multiple of it


@triton.jit
def integer_product(
    x, x_offsets, x_mask, w, row, scale, zeros, stride_w, stride_scale, k_first, k_last, K,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_T]: Σ over k_first ≤ k < k_last of w[row[n], k] · x[t, k]. `w`: uint8 (int4) or int8
    [runs, or pairs of them, rows, RUN]; `scale` and, for int4, `zeros` or None [groups, rows]."""
    tl.static_assert(BLOCK_K % GROUP == 0 and (BLOCK_K == 64 or BLOCK_K == 128))  # K is padded to 128
    i = tl.arange(0, RUN)
    w_offsets = (row * RUN)[:, None] + i[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for k0 in range(k_first, k_last, BLOCK_K):
        part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for run in tl.static_range(BLOCK_K // RUN):
            k = k0 + run * RUN + i
            if EVEN_K:
                rows = tl.load(x + x_offsets[:, None] + k[None, :], mask=x_mask[:, None], other=0.0)
            else:
                rows = tl.load(x + x_offsets[:, None] + k[None, :], mask=x_mask[:, None] & (k < K)[None, :], other=0.0)
            group = (k0 + run * RUN) // GROUP * stride_scale + row
            if w.dtype.element_ty == tl.int8:
                code = tl.load(w + (k0 // RUN + run) * stride_w + w_offsets)
            else:
                if run % 2 == 0:
                    pair = tl.load(w + (k0 // (2 * RUN) + run // 2) * stride_w + w_offsets)
                    nibble = (pair & 15).to(tl.int8)
                else:
                    nibble = (pair >> 4).to(tl.int8)
                code = nibble - (8 if zeros is None else tl.load(zeros + group).to(tl.int8)[:, None])
            part = tl.dot(code.to(rows.dtype), tl.trans(rows), part, input_precision="ieee")
            if (run + 1) * RUN % GROUP == 0:
                acc = tl.fma(part, tl.load(scale + group).to(tl.float32)[:, None], acc)
                part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    return acc
