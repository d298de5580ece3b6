"""KV caches in FP8 in the Triton kernels, in Triton's CPU interpreter or on a GPU: what is written as
kernels/cache_rows.py says, and every form of attention, to the bit, as over plain rows of the same latents.

Not collected by itself: test_triton.py runs it with TRITON_INTERPRET=1, `make test-gpu` on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from triton_cases import BF16, F32, KERNELS, randn, triton_kernels
from weight_cases import stored

from isotherm.kernels.cache_rows import fp8_row_bytes, fp8_rows, new_layer_cache, quantise, read_rows
from isotherm.kernels.triton.attention import KV_SPLIT
from isotherm.kernels.triton.backend import TritonKernels
from isotherm.kernels.triton.coded_cache import planes

CPU = torch.device("cpu")


@pytest.fixture(params=[BF16, F32], ids=["bf16", "f32"])
def kernels(request: pytest.FixtureRequest) -> TritonKernels:
    return KERNELS[request.param]


@dataclass(frozen=True)
class Both:
    """The same latents in FP8 and as they are read of it; what no token has written is NaN."""

    coded: Tensor
    plain: Tensor
    table: Tensor  # int32 [M]


def both(kernels: TritonKernels, length: int, size: int, latent: int, rotary: int, seed: int = 0) -> Both:
    blocks = -(-length // size) + 1
    coded, plain = (new_layer_cache(blocks, size, latent, rotary, kernels.dtype, CPU, fp8) for fp8 in (True, False))
    coded.fill_(0xFF)  # a NaN in every dtype
    plain.fill_(torch.nan)
    table = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(seed)).to(torch.int32) + 1
    position = torch.arange(length)
    slots = table[position // size].long() * size + position % size
    x = randn(length, latent, seed=1, dtype=kernels.dtype, scale=3.0)
    rope = randn(length, rotary, seed=2, dtype=kernels.dtype)
    at = slots // size, slots % size
    codes, keys, scales = planes(coded, latent, kernels.dtype)
    codes[at[0], at[1], :latent], factors = quantise(x)
    keys[at], scales[at] = rope, factors.to(kernels.dtype)
    plain[at] = read_rows(fp8_rows(x, rope), latent, rotary, kernels.dtype)
    return Both(coded, plain, table)


@pytest.mark.parametrize("latent, rotary", [(32, 16), (33, 6), (3, 2)])
@pytest.mark.parametrize("size", [1, 6])
def test_what_is_written_is_as_the_reference_rounds_it(
    kernels: TritonKernels, size: int, latent: int, rotary: int
) -> None:
    x = (randn(12, latent, seed=1) * 2.0 ** randn(12, latent, seed=2, scale=6.0)).to(kernels.dtype)
    x[0], x[1, 1], x[2, 2], x[3], x[4, 0] = 0.0, math.nan, -math.inf, 1e-38, 2.0**100
    rope = randn(12, latent + rotary, seed=3, dtype=kernels.dtype)[:, latent:]
    cache = new_layer_cache(-(-20 // size), size, latent, rotary, kernels.dtype, CPU, True)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(4))[:12]
    kernels.write_cache(x, rope, cache, slots)
    codes, keys, scales = (plane.flatten(0, 1) for plane in planes(cache, latent, kernels.dtype))
    expected, factors = quantise(x)
    assert torch.equal(codes[slots, :latent], expected)
    assert torch.equal(scales[slots].float(), factors) and torch.equal(keys[slots], rope)
    others = [s for s in range(20) if s not in slots.tolist()]
    assert not any(plane[others].any() for plane in (codes, keys, scales))


@pytest.mark.parametrize("shape, size", [((3, 40, 6), 16), ((2, 33, 2), 1), ((5, 64, 32), 64), ((64, 64, 16), 8)])
def test_decode_equals_that_over_plain_rows(kernels: TritonKernels, shape: tuple[int, int, int], size: int) -> None:
    """Of two rows, each alone and both together."""
    heads, latent, rotary = shape
    cache = both(kernels, 140, size, latent, rotary)
    q = randn(2, heads, latent + rotary, seed=5, dtype=kernels.dtype)

    def decode(rows: slice, entries: Tensor) -> Tensor:
        sequence, lengths = torch.zeros(2, dtype=torch.int32)[rows], torch.tensor([140, 33], dtype=torch.int32)[rows]
        queries = q[rows, :, :latent], q[rows, :, latent:]
        return kernels.mla_decode(*queries, entries, cache.table[None], sequence, lengths, 0.1)

    together = decode(slice(0, 2), cache.coded)
    assert torch.equal(together, decode(slice(0, 2), cache.plain)) and together.isfinite().all()
    for t in (0, 1):
        assert torch.equal(decode(slice(t, t + 1), cache.coded)[0], together[t])


def test_decode_depends_on_no_table_no_block_size_and_no_company(kernels: TritonKernels) -> None:
    """A row of two splits beside a short one, over other blocks, and as the same entries gathered, which is how
    DeepSeek-V3.2 reads those that its indexer has chosen."""
    length = KV_SPLIT + 70
    one, other = both(kernels, length, 16, 32, 16), both(kernels, length, 64, 32, 16, seed=1)
    q = randn(2, 3, 48, seed=5, dtype=kernels.dtype)
    first, lengths = torch.zeros(2, dtype=torch.int32), torch.tensor([length, 50], dtype=torch.int32)
    together = kernels.mla_decode(q[..., :32], q[..., 32:], one.coded, one.table[None], first, lengths, 0.1)
    alone = kernels.mla_decode(
        q[:1, :, :32], q[:1, :, 32:], other.coded, other.table[None], first[:1], lengths[:1], 0.1
    )
    assert torch.equal(alone[0], together[0])
    position = torch.arange(50)
    slots = one.table[position // 16].long() * 16 + position % 16
    chosen = kernels.gather(one.coded, torch.stack([slots, slots.flip(0)]), 32)
    assert chosen.shape == (2, 50, one.coded.shape[2])
    gathered = kernels.mla_decode(q[1:, :, :32], q[1:, :, 32:], chosen, torch.tensor([[0], [1]], dtype=torch.int32),
                                  first[:1], lengths[1:], 0.1)  # fmt: skip
    assert torch.equal(gathered[0], together[1])
    plain = kernels.gather(one.plain, slots[None], 32)[0]
    for latents, keys, scales in [[plane[1] for plane in planes(chosen, 32, kernels.dtype)]]:
        assert torch.equal(latents.view(torch.float8_e4m3fn).to(kernels.dtype) * scales[:, None], plain.flip(0)[:, :32])
        assert torch.equal(keys, plain.flip(0)[:, 32:])


@pytest.mark.parametrize("shape", [(2, 40, 6, 10, 22), (1, 32, 16, 16, 16)])
def test_prefill_equals_that_over_plain_rows_in_every_cut(
    kernels: TritonKernels, shape: tuple[int, int, int, int, int]
) -> None:
    """In chunks, and with the context expanded in segments."""
    heads, latent, rotary, nope, value = shape
    length = 150
    cache = both(kernels, length, 16, latent, rotary)
    weight = stored(heads * (nope + value), latent, "fp8", 3)
    q = randn(length, heads, nope + rotary, seed=4, dtype=kernels.dtype)
    segmented = triton_kernels(kernels.dtype)
    segmented.prefill_segment = 64
    whole = kernels.mla_prefill(q, cache.plain, cache.table, 0, kernels.pack_linear([weight]), value, 0.2)
    for k, cuts in ((kernels, [0, length]), (kernels, [0, 1, 70, length]), (segmented, [0, 129, length])):
        kv_b = k.pack_linear([weight])
        parts = [k.mla_prefill(q[a:b], cache.coded, cache.table, a, kv_b, value, 0.2) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), cuts


def test_a_cache_of_another_width_is_refused(kernels: TritonKernels) -> None:
    width = fp8_row_bytes(8, 4, kernels.dtype.itemsize)
    cache = torch.zeros(2, 4, width + 1, dtype=torch.uint8)
    x = randn(1, 12, seed=1, dtype=kernels.dtype)
    with pytest.raises(ValueError, match=rf"torch.uint8 \(2, 4, {width + 1}\).*torch.uint8 with width {width}"):
        kernels.write_cache(x[:, :8], x[:, 8:], cache, torch.zeros(1, dtype=torch.int64))
