"""Weights as the native kernels keep them, in tiles in C++ memory, and the expert bank."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.kernels.checked import check_expert, check_weights
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int8Weight, alike
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.native.context import NativeContext, created, fail, free_with
from isotherm.kernels.ops import ExpertBank

_BF16, _FP8, _F32, _INT4, _INT8 = 0, 1, 2, 4, 5  # Kind: the places in ISO_TILE_KINDS of csrc/api.h
# Formats with tiles of their own. All others are dequantised, and packed as bf16.
_TILES: dict[type[StoredWeight], int] = {Fp8Weight: _FP8, Int4Weight: _INT4, Int8Weight: _INT8}
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float8_e4m3fn: 3, torch.uint8: 4,
           torch.int8: 5}  # Dtype in api.h  # fmt: skip


class Operand(ctypes.Structure):
    """A tensor of a stored weight; `Operand` in api.h."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("dtype", ctypes.c_int))

    @classmethod
    def of(cls, rows: Tensor) -> Operand:
        if rows.dtype not in _DTYPES:
            raise TypeError(f"a tensor of a stored weight is {rows.dtype}; known are {list(_DTYPES)}")
        return cls(rows.data_ptr(), rows.stride(0), _DTYPES[rows.dtype])


class Grouping(ctypes.Structure):
    """How grouped integers are scaled; `Grouping` in api.h."""

    _fields_ = (("inputs", ctypes.c_int64), ("scale_bytes", ctypes.c_int64), ("zeros", ctypes.c_int64))

    @classmethod
    def of(cls, weights: Sequence[GroupedWeight]) -> Grouping:
        """Of weights that are scaled alike. Scales are kept as bfloat16 where that loses nothing."""
        narrow = all(torch.equal(w.scales.to(torch.bfloat16).float(), w.scales) for w in weights)
        return cls(weights[0].group, 2 if narrow else 4, weights[0].zeros is not None)


@dataclass(eq=False)
class Packed:
    """A packed weight in C++ memory, freed with this object. `part_outputs` lists the outputs of each part; bf16
    weights may take fewer bytes than the checkpoint's (kernels/native/csrc/coded.cpp)."""

    handle: int
    part_outputs: tuple[int, ...]
    inputs: int
    nbytes: int = 0


def pack(context: NativeContext, weights: Sequence[StoredWeight], bias: Tensor | None = None) -> Packed:
    """Weights that share an input, side by side; `bias` is added in float32. Raises ValueError for shapes that don't
    fit, MemoryError."""
    _, inputs = check_weights(weights, bias)
    outputs = tuple(w.shape[0] for w in weights)
    kind, sources = _tiles(weights, context.dtype)
    counts = (ctypes.c_int64 * len(outputs))(*outputs)
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    grouped = [w for w in sources if isinstance(w, GroupedWeight)]
    handle = created(
        context.lib.iso_linear_create(
            kind, inputs, len(outputs), counts, None if wide_bias is None else wide_bias.data_ptr(),
            ctypes.byref(Grouping.of(grouped)) if grouped else None,
        ),
        "a packed weight",
    )  # fmt: skip
    packed = Packed(handle, outputs, inputs)
    free_with(packed, context.lib.iso_linear_destroy, handle)
    for part, weight in enumerate(sources):
        tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in weight.tensors]
        operands = (Operand * len(tensors))(*map(Operand.of, tensors))
        if code := context.lib.iso_linear_pack(context.handle, handle, part, operands):
            fail("pack", code, "")
    if code := context.lib.iso_linear_finish(context.handle, handle):
        fail("pack", code, "")
    packed.nbytes = context.lib.iso_linear_bytes(handle)
    return packed


def _tiles(weights: Sequence[StoredWeight], dtype: torch.dtype) -> tuple[int, Sequence[StoredWeight]]:
    """The kind of tiles for all the weights, and the weights as it takes them: as they are stored where all are in one
    format with tiles of its own."""
    if dtype == torch.float32:
        return _F32, [w.plain(torch.float32) for w in weights]
    formats = {type(w) for w in weights}
    if len(formats) == 1 and (kind := _TILES.get(formats.pop())) is not None:
        grouped = [w for w in weights if isinstance(w, GroupedWeight)]
        return kind, alike(grouped) if grouped else weights
    return _BF16, [w.plain(torch.bfloat16) for w in weights]


class NativeExpertBank(ExpertBank):
    def __init__(self, context: NativeContext, slots: int, hidden: int, inner: int):
        self.hidden, self.inner = hidden, inner
        self._context = context
        self._slots: list[tuple[Packed, Packed] | None] = [None] * slots
        self.handle = created(context.lib.iso_bank_create(slots, hidden, inner), "an expert bank")
        free_with(self, context.lib.iso_bank_destroy, self.handle)

    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        self._check(slot)
        check_expert(gate, up, down, self.hidden, self.inner)
        self.drop(slot)
        packed = pack(self._context, [gate, up]), pack(self._context, [down])
        self._slots[slot] = packed
        self._context.lib.iso_bank_set(self.handle, slot, packed[0].handle, packed[1].handle)

    def drop(self, slot: int) -> None:
        self._check(slot)
        self._context.lib.iso_bank_set(self.handle, slot, None, None)
        self._slots[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for pair in self._slots if pair is not None for p in pair)

    def empty(self, slots: list[int]) -> list[int]:
        return [s for s in slots if self._slots[s] is None]

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"expert slot {slot} is not in 0 … {len(self._slots) - 1}")
