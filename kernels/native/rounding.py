"""Weights rounded to four, six and eight bits in C++ (`kernels/native/csrc/rounding.h`): the bits that
kernels/formats/rounding.py states, on every instruction set."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from isotherm.kernels.native.context import Error, NativeContext, fail
from isotherm.kernels.native.library import NativeKernelsUnavailable
from isotherm.kernels.native.operand import Operand, side_by_side

GROUP = 32  # kRoundGroup in api.h
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)  # of numbers that are read as they are stored

log = logging.getLogger(__name__)
_first = threading.Lock()


class NativeRounding:
    """Rounds in the calling thread: whoever has many weights calls from several, as a WeightReader does. `isa`,
    `library`: see NativeKernels."""

    def __init__(self, isa: str | None = None, library: Path | None = None):
        self._context = NativeContext(torch.float32, 1, isa, library)

    def int4(self, numbers: Sequence[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A weight [N, K] → nibbles uint8 [N, ⌈K / 2⌉] as Int4Weight has them, and scales float32 [N, ⌈K / GROUP⌉].
        `numbers`: one tensor of DTYPES, and of e4m3 codes the scales of their blocks. Raises ValueError where not all
        are finite."""
        rows, inputs = shape
        nibbles = torch.empty(rows, -(-inputs // 2), dtype=torch.uint8)
        return self._round(4, numbers, shape, nibbles)

    def in_bytes(self, bits: int, numbers: Sequence[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As `int4`, but codes int8 [N, K] of 6 or 8 bits. A group with a number that is not finite has such a
        scale."""
        return self._round(bits, numbers, shape, torch.empty(shape, dtype=torch.int8))

    def _round(
        self, bits: int, numbers: Sequence[Tensor], shape: tuple[int, int], codes: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, inputs = shape
        if numbers[0].shape != shape or numbers[0].dtype not in DTYPES:
            raise ValueError(f"{numbers[0].dtype} {tuple(numbers[0].shape)} is no weight {shape} that is rounded here")
        scales = torch.empty(rows, -(-inputs // GROUP))
        tensors = list(map(side_by_side, numbers))
        operands = (Operand * len(tensors))(*map(Operand.of, tensors))
        code = self._context.lib.iso_round(
            self._context.handle, bits, operands, rows, inputs, codes.data_ptr(), scales.data_ptr()
        )
        if code == Error.NOT_FINITE and bits == 4:
            raise ValueError("has numbers that are not finite")
        if code not in (0, Error.NOT_FINITE):
            fail("round", code, "")
        return codes, scales


def native_rounding() -> NativeRounding | None:
    """Of this process; None, which is logged once, where there are no native kernels."""
    with _first:
        return _made()


@cache
def _made() -> NativeRounding | None:
    try:
        return NativeRounding()
    except NativeKernelsUnavailable as error:
        log.warning("weights are rounded in plain torch, which takes ten times as long and more: %s", error)
        return None
