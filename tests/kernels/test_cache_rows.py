"""Rows of the KV cache in FP8 against the plainest statement of them, and attention over them in the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isotherm.kernels.cache_rows import fp8_row_bytes, fp8_rows, new_layer_cache, quantise, read_rows
from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.reference import ReferenceKernels

VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # of the codes from 0 to 448
DTYPES = (torch.bfloat16, torch.float32)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest(magnitude: float) -> int:
    """The code of the value that is nearest; of two, the even one."""
    distances = (VALUES - magnitude).abs()
    best = (distances == distances.min()).nonzero()[:, 0].tolist()
    return next((code for code in best if code % 2 == 0), best[0])


@settings(max_examples=60, deadline=None)
@given(exponent=st.integers(-60, 60), spread=st.sampled_from([0.1, 2.0, 8.0]), seed=st.integers(0, 1 << 20),
       dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_codes_are_the_nearest_of_the_least_scale(exponent: int, spread: float, seed: int, dtype: torch.dtype):
    x = (normal(3, 40, seed=seed) * torch.exp2(spread * normal(3, 40, seed=seed + 1)) * 2.0**exponent).to(dtype)
    codes, scales = quantise(x)
    for row, found, scale in zip(x.double().tolist(), codes.tolist(), scales.tolist(), strict=True):
        most = max(map(abs, row))
        assert math.frexp(scale)[0] == 0.5 and most <= 448 * scale and most > 448 * scale / 2
        expected = [nearest(abs(v) / scale) | (0x80 if v < 0 else 0) for v in row]
        assert found == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rotary"), [(512, 64), (32, 8), (33, 6), (3, 2)])
def test_what_is_read_is_code_times_scale_without_a_rounding(latent: int, rotary: int, dtype: torch.dtype):
    x, rope = normal(9, latent, dtype=dtype), normal(9, rotary, seed=1, dtype=dtype)
    rows = fp8_rows(x, rope)
    assert rows.shape == (9, fp8_row_bytes(latent, rotary, dtype.itemsize)) and rows.dtype == torch.uint8
    codes, scales = quantise(x)
    read = read_rows(rows.view(3, 3, -1), latent, rotary, dtype)
    assert read.shape == (3, 3, latent + rotary) and read.dtype == dtype
    exact = codes.view(torch.float8_e4m3fn).double() * scales.double()[:, None]
    assert torch.equal(read.flatten(0, 1)[:, :latent].double(), exact)
    assert torch.equal(read.flatten(0, 1)[:, latent:], rope)
    # Three bits of mantissa: within a 16th, but for what is below the least normal number, 2^-6.
    assert ((exact - x.double()).abs() <= (x.double().abs() / 16).clamp(min=2.0**-10 * scales[:, None])).all()
    assert torch.equal(fp8_rows(read[0, :, :latent], rope[:3]), rows[:3])  # what has been rounded stays


def test_a_row_of_deepseek_v3_is_642_bytes_of_1152():
    assert fp8_row_bytes(512, 64, 2) == 642
    cache = new_layer_cache(5, 4, 512, 64, torch.bfloat16, torch.device("cpu"), True)
    assert cache.shape == (5, 4, 642) and cache.dtype == torch.uint8 and not cache.any()
    plain = new_layer_cache(5, 4, 512, 64, torch.bfloat16, torch.device("cpu"), False)
    assert plain.shape == (5, 4, 576) and plain.dtype == torch.bfloat16 and plain.nbytes == 5 * 4 * 1152


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_and_what_is_not_finite_makes_its_row_nan(dtype: torch.dtype):
    x = torch.zeros(5, 6, dtype=dtype)
    x[1, 2], x[2, 3], x[3, 4], x[4, 5] = math.nan, math.inf, 1e-38, -1.5
    read = read_rows(fp8_rows(x, x[:, :2]), 6, 2, dtype)[:, :6]
    assert torch.equal(read[[0, 3, 4]], torch.tensor([[0.0] * 6, [0.0] * 6, [0.0] * 5 + [-1.5]], dtype=dtype))
    assert read[1:3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_reads_the_rounded_latent(dtype: torch.dtype):
    """Attention in FP8 rows is, to the bit, that in plain rows of the same rounded latents."""
    kernels, latent, rotary, heads, nope, value, length = ReferenceKernels(dtype), 33, 6, 3, 10, 8, 21
    x, rope = normal(length, latent, dtype=dtype), normal(length, rotary, seed=1, dtype=dtype)
    slots = torch.arange(length) + 4  # blocks 1 … 6
    coded, plain = (new_layer_cache(7, 4, latent, rotary, dtype, torch.device("cpu"), fp8) for fp8 in (True, False))
    kernels.write_cache(x, rope, coded, slots)
    kernels.write_cache(read_rows(fp8_rows(x, rope), latent, rotary, dtype)[:, :latent], rope, plain, slots)
    table = torch.arange(1, 7, dtype=torch.int32)
    kv_b = kernels.pack_linear([PlainWeight(normal(heads * (nope + value), latent, seed=3))])
    q = normal(9, heads, nope + rotary, seed=4, dtype=dtype)
    one, other = (kernels.mla_prefill(q, cache, table, 12, kv_b, value, 0.2) for cache in (coded, plain))
    assert torch.equal(one, other)
    q = normal(2, heads, latent + rotary, seed=5, dtype=dtype)
    rows = table[None], torch.zeros(2, dtype=torch.int32), torch.tensor([21, 5], dtype=torch.int32)
    one, other = (kernels.mla_decode(q[..., :latent], q[..., latent:], c, *rows, 0.2) for c in (coded, plain))
    assert torch.equal(one, other) and not torch.equal(one[0], one[1])
