"""Packed weights as bytes: what one process has packed, another one of the same layout takes as it is, to the bit."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from isotherm.kernels.expert_bank import ForeignBytesError
from isotherm.kernels.formats.grouped import GROUPS
from isotherm.kernels.native.context import NativeContext, created, free_with

# Version of how tiles lie in memory. Raise it with whatever changes a byte of them
# (tests/kernels/native/test_packed.py tells when it was forgotten).
TILES = 3
# Scales of a byte: exponents that the least of a weight may be, as float32 has it, and how many there are from it on.
LEAST_EXPONENTS, EXPONENTS = 248, 8
_WIDEST = 4.5  # bytes of a weight in any kind of tiles, scales and exceptions included


class Kind(IntEnum):
    """How a packed weight is kept: `Kind` in api.h, in the order of its ISO_TILE_KINDS."""

    BF16 = 0
    FP8 = 1
    F32 = 2
    CODED = 3
    INT4 = 4
    INT8 = 5
    INT6 = 6


_INTEGERS = (Kind.INT4, Kind.INT6, Kind.INT8)


class Grouping(ctypes.Structure):
    """How grouped integers are scaled; `Grouping` in api.h."""

    _fields_ = (
        ("inputs", ctypes.c_int64),
        ("scale_bytes", ctypes.c_int64),
        ("zeros", ctypes.c_int64),
        ("exponent", ctypes.c_int64),
    )


class LinearForm(ctypes.Structure):
    """Where a packed weight lies; `LinearForm` in api.h."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("biased", ctypes.c_int),
        ("grouping", Grouping),
        ("data", ctypes.c_void_p),
        ("data_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scales_bytes", ctypes.c_int64),
    )


@dataclass(eq=False)
class Packed:
    """A packed weight in C++ memory, freed with this object. `part_outputs` lists the outputs of each part; bf16
    weights may take fewer bytes than the checkpoint's (kernels/native/csrc/coded.cpp)."""

    handle: int
    part_outputs: tuple[int, ...]
    inputs: int
    nbytes: int = 0


def packed_of(context: NativeContext, handle: int | None, part_outputs: tuple[int, ...], inputs: int) -> Packed:
    packed = Packed(created(handle, "a packed weight"), part_outputs, inputs)
    free_with(packed, context.lib.iso_linear_destroy, packed.handle)
    return packed


def layout(context: NativeContext) -> str:
    """Contexts that say the same pack a weight into the same bytes."""
    return f"native tiles {TILES}, {context.isa}, {str(context.dtype).removeprefix('torch.')}"


def form_of(context: NativeContext, packed: Packed) -> list[int]:
    """What `room` must be told, beside the shape, to have the room for this weight's bytes."""
    found = _look(context, packed)
    if found.biased:
        raise ValueError("a packed weight with a bias is not copied")
    grouping = found.grouping
    numbers = (getattr(grouping, name) for name, _ in Grouping._fields_)
    return [found.kind, *numbers, found.data_bytes, found.scales_bytes]


def bytes_of(context: NativeContext, packed: Packed) -> list[memoryview]:
    """A packed weight's bytes where they lie: to be read or filled while `packed` lives."""
    found = _look(context, packed)
    spans = ((found.data, found.data_bytes), (found.scales, found.scales_bytes))
    return [memoryview((ctypes.c_uint8 * size).from_address(at)).cast("B") for at, size in spans if size]


def room(context: NativeContext, form: object, part_outputs: tuple[int, ...], inputs: int) -> Packed:
    """A weight of this shape whose bytes are to be filled. Raises ForeignBytesError for what is no weight's form."""
    kind, *numbers, data_bytes, scales_bytes = _checked(context, form, sum(part_outputs), inputs)
    grouping = Grouping(*numbers) if numbers[0] else None
    counts = (ctypes.c_int64 * len(part_outputs))(*part_outputs)
    handle = context.lib.iso_linear_room(
        kind, inputs, len(part_outputs), counts, None if grouping is None else ctypes.byref(grouping), data_bytes
    )
    if not handle:
        raise ForeignBytesError(f"there is no room for tiles of kind {kind} in {data_bytes} bytes")
    packed = packed_of(context, handle, part_outputs, inputs)
    if _look(context, packed).scales_bytes != scales_bytes:
        raise ForeignBytesError(f"scales of {scales_bytes} bytes do not belong to tiles of kind {kind} here")
    return packed


def adopt(context: NativeContext, packed: Packed) -> None:
    """After the room was filled. Raises ForeignBytesError where the bytes cannot be a weight's."""
    if context.lib.iso_linear_adopt(packed.handle):
        raise ForeignBytesError("the bytes are not those of packed tiles")
    packed.nbytes = context.lib.iso_linear_bytes(packed.handle)


def _look(context: NativeContext, packed: Packed) -> LinearForm:
    found = LinearForm()
    context.lib.iso_linear_form(packed.handle, ctypes.byref(found))
    return found


def _checked(context: NativeContext, form: object, outputs: int, inputs: int) -> Sequence[int]:
    """What another process says of its weight, as numbers that this context's kernels can read the bytes by."""
    if not isinstance(form, list) or len(form) != 7 or any(type(number) is not int for number in form):
        raise ForeignBytesError(f"a packed weight's form is seven whole numbers, not {form!r:.80}")
    kind, group, scale_bytes, zeros, exponent, data_bytes, scales_bytes = form
    most = _WIDEST * (outputs + 64) * (inputs + 512)
    sound = (
        kind in tuple(Kind)
        and (kind == Kind.F32) == (context.dtype == torch.float32)
        and not (kind == Kind.CODED and context.isa == "generic")
        and (group in GROUPS and scale_bytes in (1, 2, 4) if kind in _INTEGERS else group == scale_bytes == 0)
        and (0 < exponent < LEAST_EXPONENTS if scale_bytes == 1 else exponent == 0)
        and zeros in ((0, 1) if kind == Kind.INT4 else (0,))
        and 0 < data_bytes < most
        and 0 <= scales_bytes < most
    )
    if not sound:
        raise ForeignBytesError(
            f"no packed weight of {outputs} × {inputs} has the form {form} for {context.isa} and {context.dtype}"
        )
    return form
