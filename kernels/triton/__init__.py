"""The operations in Triton, for NVIDIA GPUs from Hopper (sm_90) on. `backend.py` and `attention.py` are the host side.

    gemm.py          linear, head_linear, the fused gate·up of mlp; bf16 and FP8 128×128-block weights
    integers.py      the product with int4 and int8, for all of these
    grouped.py       the same two over sorted rows of many experts
    decode.py        mla_decode: paged, absorbed, fixed absolute KV splits
    prefill.py       mla_prefill: expanded, causal, fixed absolute key tiles
    route.py         gate product, sigmoid, bias, group limit, top-k, normalise
    coded_cache.py   the KV cache in FP8: how it lies, written and read
    elementwise.py   rms_norm (with an optional residual add), rope, combine, write_cache
    sample.py        greedy, Gumbel noise, top-k and top-p
    launch.py        the only place that starts a kernel
    weights.py       packing, and the expert bank; integer_weights.py: of integers
    interpreter.py   corrections to Triton's CPU interpreter, for machines without a GPU

What has been checked is in docs/exactness.md: by `make test-gpu` on a GPU; without one every operation is compared with
kernels/reference.py through Triton's CPU interpreter on small shapes, and every kernel is compiled for sm_90 at
DeepSeek-V3's real shapes, within its shared memory and without spills (tests/kernels/triton/test_triton.py and
test_triton_aot.py). The interpreter runs one program after another in numpy, so it cannot show a race, a misaligned
access, or how a tensor core rounds.

Why a row's bits don't depend on its company, and what that relies on:

- Matrix products are computed as weight × rowsᵀ, so that outputs are the M side of a tensor core instruction and rows
  its N side. Every tile size, for one row or for thousands, then uses one instruction family (wgmma m64nNk16), one K
  step, and one K order per element; only N differs. Relied on: an element of wgmma's result does not depend on N or on
  the element's place in the tile. (A kernel that put rows on the M side would need mma.sync below 64 rows, which may
  accumulate in another order.) No multiply and add are fused but by an explicit tl.fma (launch.py), so that no compiler
  may fuse in one variant and not in another.
- Integers are summed group by group, each group's float32 sum added with its scale by one explicit fma, whatever the
  tile.
- A narrow weight is split over K at places that its shape alone decides; the parts are added in order, by one program
  or from a workspace.
- Attention takes keys in tiles counted from position 0. Prefill has one tile shape; decode has one tile shape and
  splits of a fixed length, merged in order. Relied on: keys that a row may not see add exact zeros to its accumulators
  and rescale them by exactly one.
- A latent in FP8 has a scale that is a power of two, so that it may stand at the score and at the softmax's weight in
  place of the latent: short of underflow that rounds nothing.
- Reductions over a row (norms, routing, sampling) are done by one program with one configuration for any number of
  rows. Row counts are not specialised (`do_not_specialize`), so one row and many run one binary.
"""
