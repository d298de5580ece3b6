"""Weights as the native kernels keep them, in tiles in C++ memory, and the expert bank."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isotherm.kernels.checked import check_expert, check_weights
from isotherm.kernels.expert_bank import ExpertBank, ForeignBytesError, PackedExpert
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int6Weight, Int8Weight, alike
from isotherm.kernels.formats.rounding import INT4_SCALE_BITS
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.native.context import NativeContext, created, fail, free_with
from isotherm.kernels.native.operand import Operand, side_by_side
from isotherm.kernels.native.packed import (
    EXPONENTS,
    LEAST_EXPONENTS,
    Grouping,
    Kind,
    Packed,
    adopt,
    bytes_of,
    form_of,
    layout,
    packed_of,
    room,
)

# Formats with tiles of their own. All others are dequantised, and packed as bf16.
_TILES: dict[type[StoredWeight], Kind] = {
    Fp8Weight: Kind.FP8, Int4Weight: Kind.INT4, Int6Weight: Kind.INT6, Int8Weight: Kind.INT8
}  # fmt: skip


def _grouping(weights: Sequence[GroupedWeight]) -> Grouping:
    """Of weights that are scaled alike. Scales are kept in a byte, or as bfloat16, where that loses nothing."""
    first = weights[0]
    group, zeros = first.group, first.zeros is not None
    if (exponent := _least_exponent([w.scales for w in weights])) is not None:
        return Grouping(group, 1, zeros, exponent)
    narrow = all(torch.equal(w.scales.to(torch.bfloat16).float(), w.scales) for w in weights)
    return Grouping(group, 2 if narrow else 4, zeros)


def _least_exponent(scales: Sequence[Tensor]) -> int | None:
    """Of scales that a byte can hold, as float32 has it, biased; None where one cannot be held."""
    bits = [each.view(torch.int32) for each in scales]
    beyond = (1 << 23 - INT4_SCALE_BITS) - 1
    if any(bool((each & beyond).any()) for each in bits):
        return None
    ends = [(each >> 23 & 0xFF).aminmax() for each in bits]
    least, most = min(int(low) for low, _ in ends), max(int(high) for _, high in ends)
    return least if 0 < least < LEAST_EXPONENTS and most < least + EXPONENTS else None


def pack(context: NativeContext, weights: Sequence[StoredWeight], bias: Tensor | None = None) -> Packed:
    """Weights that share an input, side by side; `bias` is added in float32. Raises ValueError for shapes that don't
    fit, MemoryError."""
    _, inputs = check_weights(weights, bias)
    outputs = tuple(w.shape[0] for w in weights)
    kind, sources = _tiles(weights, context.dtype)
    counts = (ctypes.c_int64 * len(outputs))(*outputs)
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    grouped = [w for w in sources if isinstance(w, GroupedWeight)]
    handle = context.lib.iso_linear_create(
        kind, inputs, len(outputs), counts, None if wide_bias is None else wide_bias.data_ptr(),
        ctypes.byref(_grouping(grouped)) if grouped else None,
    )  # fmt: skip
    packed = packed_of(context, handle, outputs, inputs)
    for part, weight in enumerate(sources):
        tensors = list(map(side_by_side, weight.tensors))
        operands = (Operand * len(tensors))(*map(Operand.of, tensors))
        if code := context.lib.iso_linear_pack(context.handle, packed.handle, part, operands):
            fail("pack", code, "")
    if code := context.lib.iso_linear_finish(context.handle, packed.handle):
        fail("pack", code, "")
    packed.nbytes = context.lib.iso_linear_bytes(packed.handle)
    return packed


def _tiles(weights: Sequence[StoredWeight], dtype: torch.dtype) -> tuple[Kind, Sequence[StoredWeight]]:
    """The kind of tiles for all the weights, and the weights as it takes them: as they are stored where all are in one
    format with tiles of its own."""
    if dtype == torch.float32:
        return Kind.F32, [w.plain(torch.float32) for w in weights]
    formats = {type(w) for w in weights}
    if len(formats) == 1 and (kind := _TILES.get(formats.pop())) is not None:
        grouped = [w for w in weights if isinstance(w, GroupedWeight)]
        return kind, alike(grouped) if grouped else weights
    return Kind.BF16, [w.plain(torch.bfloat16) for w in weights]


class NativeExpertBank(ExpertBank):
    def __init__(self, context: NativeContext, slots: int, hidden: int, inner: int):
        self.hidden, self.inner = hidden, inner
        self._context = context
        self._slots: list[tuple[Packed, Packed] | None] = [None] * slots
        self.layout = layout(context)
        self.handle = created(context.lib.iso_bank_create(slots, hidden, inner), "an expert bank")
        free_with(self, context.lib.iso_bank_destroy, self.handle)

    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        self._check(slot)
        check_expert(gate, up, down, self.hidden, self.inner)
        self.drop(slot)
        self._put(slot, (pack(self._context, [gate, up]), pack(self._context, [down])))

    def _put(self, slot: int, packed: tuple[Packed, Packed]) -> None:
        self._slots[slot] = packed
        self._context.lib.iso_bank_set(self.handle, slot, packed[0].handle, packed[1].handle)

    def drop(self, slot: int) -> None:
        self._check(slot)
        self._context.lib.iso_bank_set(self.handle, slot, None, None)
        self._slots[slot] = None

    def packed(self, slot: int) -> PackedExpert:
        self._check(slot)
        if (held := self._slots[slot]) is None:
            raise IndexError(f"expert slot {slot} is empty")
        forms = [form_of(self._context, weight) for weight in held]
        return PackedExpert(forms, self._bytes(held), held)

    def room(self, form: Any) -> PackedExpert:
        if not isinstance(form, list) or len(form) != 2:
            raise ForeignBytesError(f"an expert's form is that of two packed weights, not {form!r:.80}")
        gate_up = room(self._context, form[0], (self.inner, self.inner), self.hidden)
        weights = gate_up, room(self._context, form[1], (self.hidden,), self.inner)
        return PackedExpert(form, self._bytes(weights), weights)

    def take(self, slot: int, expert: PackedExpert) -> None:
        self._check(slot)
        for weight in expert.owner:
            adopt(self._context, weight)
        self.drop(slot)
        self._put(slot, expert.owner)

    def _bytes(self, weights: tuple[Packed, Packed]) -> list[memoryview]:
        return [part for weight in weights for part in bytes_of(self._context, weight)]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for pair in self._slots if pair is not None for p in pair)

    def empty(self, slots: list[int]) -> list[int]:
        return [s for s in slots if self._slots[s] is None]

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"expert slot {slot} is not in 0 … {len(self._slots) - 1}")
