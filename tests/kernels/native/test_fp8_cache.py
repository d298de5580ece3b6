"""KV caches in FP8 in the native kernels: rows as kernels/cache_rows.py says, and every form of attention, to the bit,
as over plain rows of the same rounded latents."""

from __future__ import annotations

import pytest
import torch
from native_cases import LATENT, ROTARY, WIDTH, attention_rows, attention_weights, native, runnable
from native_there import require_native
from weight_cases import BF16, F32, randn, stored

from isotherm.kernels.cache_rows import fp8_row_bytes, fp8_rows, new_layer_cache, read_rows
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import Kernels

require_native()

CPU = torch.device("cpu")


@pytest.fixture(params=[(isa, dtype) for isa in runnable() for dtype in (BF16, F32)],
                ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")  # fmt: skip
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return native(request.param[1], 2, request.param[0])


def uneven(rows: int, width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, with values far below the largest, zeros of both signs, and one that is NaN."""
    x = randn(rows, width, seed=seed) * torch.exp2(5 * randn(rows, width, seed=seed + 1))
    x *= torch.exp2(20 * randn(rows, 1, seed=seed + 2))
    x[::3, ::5] = 0.0
    x[1::3, ::7] = -0.0
    x[2 % rows] = 0.0
    x[rows - 1, width // 2] = torch.inf
    return x.to(dtype)


@pytest.mark.parametrize(("latent", "rotary"), [(512, 64), (64, 16), (40, 6), (33, 2), (3, 30)])
def test_rows_are_written_as_they_are_defined(kernels: NativeKernels, latent: int, rotary: int) -> None:
    for count in (1, 11, 300):
        x, rope = uneven(count, latent, 1, kernels.dtype), randn(count, rotary, seed=5, dtype=kernels.dtype)
        cache = new_layer_cache(101, 4, latent, rotary, kernels.dtype, CPU, True)
        slots = torch.randperm(404, generator=torch.Generator().manual_seed(1))[:count]
        kernels.write_cache(x, rope, cache, slots)
        assert torch.equal(cache.view(404, -1)[slots], fp8_rows(x, rope))
        assert cache.view(404, -1).any(-1).sum() <= count


def test_every_value_of_bfloat16_is_rounded_as_it_is_defined(kernels: NativeKernels) -> None:
    """Each as a part of a row whose scale is 1, where it fits."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BF16).float()
    x = x[x.abs() <= 448]
    x = torch.nn.functional.pad(x, (0, -len(x) % 67)).view(-1, 67).to(kernels.dtype)
    x = torch.cat([x, torch.full((len(x), 1), 448.0, dtype=kernels.dtype)], -1)
    cache = new_layer_cache(len(x), 1, 68, 2, kernels.dtype, CPU, True)
    kernels.write_cache(x, x[:, :2], cache, torch.arange(len(x)))
    assert torch.equal(cache[:, 0], fp8_rows(x, x[:, :2]))


def both(kernels: NativeKernels, positions: int, latent: int, rotary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One cache in FP8, whose last block is NaN, and what is read of it, in blocks of 4."""
    x = randn(positions, latent, seed=1, dtype=kernels.dtype)
    x[-4:] = torch.nan
    cache = new_layer_cache(positions // 4, 4, latent, rotary, kernels.dtype, CPU, True)
    kernels.write_cache(x, randn(positions, rotary, seed=2, dtype=kernels.dtype), cache, torch.arange(positions))
    return cache, read_rows(cache, latent, rotary, kernels.dtype)


@pytest.mark.parametrize("shape", [(1, 32, 16), (3, 40, 6), (20, 512, 64), (2, 33, 2), (5, 100, 30)])
def test_decode_equals_that_over_plain_rows(kernels: NativeKernels, shape: tuple[int, int, int]) -> None:
    heads, latent, rotary = shape
    coded, plain = both(kernels, 640, latent, rotary)
    tables = torch.randperm(159, generator=torch.Generator().manual_seed(3)).to(torch.int32)[None]
    for lengths in ([1], [2, 257, 599], [600] * 12):
        q = randn(len(lengths), heads, latent + rotary, seed=5, dtype=kernels.dtype)
        rows = tables, torch.zeros(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), 0.1
        one, other = (kernels.mla_decode(q[..., :latent], q[..., latent:], c, *rows) for c in (coded, plain))
        assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 32, 16, 16, 16), (3, 40, 6, 10, 22), (5, 33, 2, 17, 30)])
def test_prefill_equals_that_over_plain_rows(kernels: NativeKernels, shape: tuple[int, int, int, int, int]) -> None:
    heads, latent, rotary, nope, value = shape
    coded, plain = both(kernels, 640, latent, rotary)
    table = torch.randperm(159, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    kv_b = kernels.pack_linear([stored(heads * (nope + value), latent, "fp8", 3)])
    for start, count in ((0, 1), (3, 130), (500, 96)):
        q = randn(count, heads, nope + rotary, seed=4, dtype=kernels.dtype)
        one, other = (kernels.mla_prefill(q, c, table, start, kv_b, value, 0.2) for c in (coded, plain))
        assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.parametrize(("decodes", "chunks"), [([0, 9, 30], []), ([], [(0, 7)]), ([300, 2], [(0, 5), (8, 30)])])
def test_attention_in_one_call_equals_its_operations(kernels: NativeKernels, decodes, chunks) -> None:
    weights = attention_weights(kernels, "fp8", 40, False)
    rows, blocks = attention_rows(decodes, chunks)
    first = randn(blocks * 4, LATENT + ROTARY, seed=8, dtype=kernels.dtype)
    out = []
    for attention in (NativeKernels.attention, Kernels.attention):
        x = randn(len(rows.cache_slots), WIDTH, seed=7, dtype=kernels.dtype)
        cache = new_layer_cache(blocks, 4, LATENT, ROTARY, kernels.dtype, CPU, True)
        kernels.write_cache(first[:, :LATENT], first[:, LATENT:], cache, torch.arange(blocks * 4))
        out.append((attention(kernels, x, weights, rows, cache), x, cache))
    assert all(torch.equal(one, other) for one, other in zip(*out, strict=True))


def test_a_prompt_in_chunks_equals_it_in_one(kernels: NativeKernels) -> None:
    """A chunk reads its own rows in FP8 too."""
    weights = attention_weights(kernels, "bf16", None, False)
    out = []
    for chunks in ([(0, 60)], [(0, 1), (1, 30), (31, 29)]):
        cache = new_layer_cache(15, 4, LATENT, ROTARY, kernels.dtype, CPU, True)
        whole, _ = attention_rows([], [(0, 60)])
        parts = []
        for start, count in chunks:
            mine = slice(start, start + count)
            some, _ = attention_rows([], [(start, count)])
            chunk = type(some.prefills[0])(0, count, start, whole.prefills[0].block_table)
            rows = type(some)(
                whole.cos_TR2[mine], whole.sin_TR2[mine], whole.cache_slots[mine], 0, some.decode_tables,
                some.decode_sequence, some.decode_lengths, (chunk,),
            )  # fmt: skip
            parts.append(
                kernels.attention(randn(60, WIDTH, seed=7, dtype=kernels.dtype)[mine].clone(), weights, rows, cache)
            )
        out.append((torch.cat(parts), cache))
    assert all(torch.equal(one, other) for one, other in zip(*out, strict=True))


def test_a_cache_of_another_width_is_refused(kernels: NativeKernels) -> None:
    width = fp8_row_bytes(8, 4, kernels.dtype.itemsize)
    cache = torch.zeros(2, 4, width + 1, dtype=torch.uint8)
    x = randn(1, 12, seed=1, dtype=kernels.dtype)
    with pytest.raises(ValueError, match=rf"torch.uint8 \(2, 4, {width + 1}\).*torch.uint8 with width {width}"):
        kernels.write_cache(x[:, :8], x[:, 8:], cache, torch.zeros(1, dtype=torch.int64))
