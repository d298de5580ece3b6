"""The bits that each instruction set gives for fixed inputs. Where this fails after a change of the kernels, the
order in which they add up has changed: raise NativeKernels.summation, so that workers of the old version are kept out
of clusters of the new one, and put the new hashes here."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from native_there import require_native
from torch import Tensor

from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GROUP, Int4Weight, Int8Weight, pack_nibbles
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.context import ISAS
from isotherm.kernels.native.library import NativeKernelsUnavailable

require_native()

HIDDEN, INNER, EXPERTS = 288, 160, 4
HEADS, LATENT, ROTARY, BLOCK = 3, 64, 16, 8


def pattern(*shape: int, step: int) -> Tensor:
    """The same on every machine, exact in bfloat16, and spread over 16 powers of two, so that sums are rounded."""
    n = torch.arange(math.prod(shape), dtype=torch.int64) * step
    return torch.ldexp((n % 127 - 63).float(), n % 17 - 14).reshape(shape)


def fp8(*shape: int, step: int) -> Fp8Weight:
    blocks = [-(-n // 128) for n in shape]
    data = pattern(*shape, step=step).clamp(-440, 440).to(torch.float8_e4m3fn)
    return Fp8Weight(data, 1 + pattern(*blocks, step=7).abs() / 64)


def integers(rows: int) -> list[StoredWeight]:
    """Of no quantiser, for another one is no change of sums."""
    codes = (torch.arange(rows * HIDDEN) * 37 % 251).view(rows, HIDDEN)
    scales = 1 + pattern(rows, -(-HIDDEN // GROUP), step=7).abs() / 64
    return [
        Int4Weight(pack_nibbles((codes % 16).to(torch.uint8)), scales.to(torch.bfloat16).float()),
        Int4Weight(
            pack_nibbles((codes % 16).to(torch.uint8)), scales, (codes[:, : scales.shape[1]] % 13).to(torch.uint8)
        ),
        Int8Weight((codes - 125).to(torch.int8), scales),
    ]


def results(kernels: NativeKernels) -> list[Tensor]:
    x = pattern(7, HIDDEN, step=31).to(kernels.dtype)
    out = [kernels.rms_norm(x, pattern(HIDDEN, step=11), 1e-6)]
    numbers = PlainWeight(pattern(96, HIDDEN, step=37).to(torch.bfloat16))
    for weight in (numbers, fp8(96, HIDDEN, step=37), *integers(96)):
        packed = kernels.pack_linear([weight])
        out += [kernels.linear(x, packed, torch.float32), kernels.linear(x[:1], packed, torch.float32)]
    bank = kernels.expert_bank(EXPERTS, HIDDEN, INNER)
    for e in range(EXPERTS):
        gate_up = fp8(INNER, HIDDEN, step=41 + e), fp8(INNER, HIDDEN, step=53 + e)
        bank.load(e, *gate_up, fp8(HIDDEN, INNER, step=67 + e))
    rows, slots = torch.tensor([0, 3, 6, 1, 2, 5, 4]), torch.arange(EXPERTS)
    offsets = torch.tensor([0, 2, 3, 5, 7])
    y = kernels.experts(x / 64, bank, *(t.to(torch.int32) for t in (rows, slots, offsets)))
    out += [y, kernels.combine(y, torch.tensor([[0, 3, 5]], dtype=torch.int32), pattern(1, 3, step=5))]
    cache = pattern(40, BLOCK, LATENT + ROTARY, step=43).to(kernels.dtype) / 16
    q = [pattern(2, HEADS, width, step=29).to(kernels.dtype) / 64 for width in (LATENT, ROTARY)]
    tables = torch.arange(40, dtype=torch.int32).reshape(2, 20)
    indices = (torch.tensor(i, dtype=torch.int32) for i in ([0, 1], [157, 33]))
    return [*out, kernels.mla_decode(*q, cache, tables, *indices, 0.1)]


def bits(kernels: NativeKernels) -> str:
    digest = hashlib.sha256()
    for tensor in results(kernels):
        assert tensor.isfinite().all()
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


VERSION = 3
BITS = {
    ("amx_bf16", "bfloat16"): "b309a97d17a7",
    ("amx_bf16", "float32"): "1c5d388cd1b0",  # as avx512_bf16
    ("avx512_bf16", "bfloat16"): "4deab0d3edf7",
    ("avx512_bf16", "float32"): "1c5d388cd1b0",
    ("avx2", "bfloat16"): "a08f489d586b",
    ("avx2", "float32"): "f58ccdbe21ad",
    ("generic", "bfloat16"): "9c28b107d214",
    ("generic", "float32"): "e462078790e4",
}


def machines_isas() -> list[str]:
    found = []
    for isa in ISAS:
        try:
            NativeKernels(torch.bfloat16, 1, isa)
        except NativeKernelsUnavailable:
            continue
        found.append(isa)
    return found


@pytest.mark.parametrize("isa", machines_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_a_change_of_bits_is_a_new_version(isa: str, dtype: torch.dtype):
    kernels = NativeKernels(dtype, 2, isa)
    assert kernels.summation == VERSION and kernels.instructions == isa
    assert bits(kernels) == BITS[isa, str(dtype).removeprefix("torch.")]
