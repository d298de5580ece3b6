"""Stored weights of every kind, and banks of experts, for the tests of kernels."""

from __future__ import annotations

import torch

from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int6Weight, Int8Weight, pack_nibbles
from isotherm.kernels.formats.registry import quantised
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.ops import Kernels

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def randn(*shape: int, seed: int, dtype: torch.dtype = F32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def stored(rows: int, columns: int, kind: str, seed: int, both_ways: tuple[int, int] | None = None) -> StoredWeight:
    """`both_ways`: as `quantised` takes it, for "int4"."""
    data = randn(rows, columns, seed=seed, scale=columns**-0.5)
    if kind == "int4" and both_ways is not None:
        return quantised(kind, PlainWeight(data), both_ways)
    if kind in INTEGERS:
        return integers(data, kind, seed)
    if kind != "fp8":
        return PlainWeight(data.to({"bf16": BF16, "f16": torch.float16, "f32": F32}[kind]))
    blocks = (-(-rows // 128), -(-columns // 128))
    scale = torch.rand(blocks, generator=torch.Generator().manual_seed(seed + 1)) * 0.01 + 0.001
    wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return Fp8Weight((data / wide).clamp(-448, 448).to(FP8), scale)


# Beside those of the quantiser: larger groups, zero points, scales that are no bfloat16 numbers.
INTEGERS = ("int4", "int4 with zeros", "int6", "int6 wide", "int8", "int8 wide")


def integers(data: torch.Tensor, kind: str, seed: int) -> StoredWeight:
    if kind in ("int4", "int6", "int8"):
        return quantised(kind, PlainWeight(data))
    generator, group = torch.Generator().manual_seed(seed), 64 if kind == "int4 with zeros" else 128
    rows, columns = data.shape
    scales = (torch.rand(rows, -(-columns // group), generator=generator) + 0.1) * columns**-0.5
    if kind == "int6 wide":
        return Int6Weight(torch.randint(-31, 32, data.shape, generator=generator).to(torch.int8), scales / 22, group)
    if kind == "int8 wide":
        return Int8Weight(torch.randint(-127, 128, data.shape, generator=generator).to(torch.int8), scales / 90, group)
    codes = torch.randint(0, 16, data.shape, generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, scales.shape, generator=generator).to(torch.uint8)
    return Int4Weight(pack_nibbles(codes), scales / 6, zeros, group, columns)


def taken(x: torch.Tensor, weight: StoredWeight, isa: str) -> torch.Tensor:
    """bf16 rows as an instruction set's products with the weight take them: AVX2's with integers have the inputs that
    share a scale as one power of two × whole numbers below 2^15."""
    if isa != "avx2" or x.dtype != BF16 or not isinstance(weight, GroupedWeight) or x.numel() == 0:
        return x.float()
    rounded = []
    for part in x.float().split(weight.group, 1):
        exponent = torch.frexp(part.abs().amax(1, keepdim=True)).exponent
        rounded.append(torch.ldexp(torch.ldexp(part, 15 - exponent).round(), exponent - 15))
    return torch.cat(rounded, 1)


def filled_banks(kernels: list[Kernels], slots: int, hidden: int, inner: int, kind: str) -> list[ExpertBank]:
    banks = [k.expert_bank(slots, hidden, inner) for k in kernels]
    for slot in range(slots - 1):  # the last stays empty
        weights = (
            stored(inner, hidden, kind, slot * 9),
            stored(inner, hidden, kind, slot * 9 + 3),
            stored(hidden, inner, kind, slot * 9 + 6),
        )
        for bank in banks:
            bank.load(slot, *weights)
    return banks
