"""Every weight format that the kernels can compute with, by the name that cluster/model/formats gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from isotherm.kernels.formats.fp8 import BLOCK, E4M3, Fp8Weight
from isotherm.kernels.formats.grouped import Int4Weight, Int6Weight, Int8Weight
from isotherm.kernels.formats.published import PUBLISHED
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight

PART_BYTES = 64 << 20  # in float32, of the rows that are quantised at once
FORMATS: dict[str, type[StoredWeight]] = {
    f.name: f for f in (PlainWeight, Fp8Weight, Int4Weight, Int6Weight, Int8Weight)
}


def stored_weight(name: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> StoredWeight:
    """A weight of role → tensor, which a checkpoint stores in the format `name`."""
    if (read := PUBLISHED.get(name)) is not None:
        return read(tensors, parameters)
    return _format(name).of(tensors, parameters)


def quantised(name: str, weight: StoredWeight, both_ways: tuple[int, int] | None = None) -> StoredWeight:
    """`weight` in the format `name`. A large one is quantised some rows at a time, for it is widened for that.
    `both_ways` (n, of): the transpose of the first n of every `of` rows is to be had in this format too."""
    form, rows = _format(name), weight.shape[0]
    if both_ways is not None and form is Int4Weight:
        return Int4Weight.quantise_both_ways(weight, *both_ways)
    step = max(BLOCK, PART_BYTES // (4 * weight.shape[1]) // BLOCK * BLOCK)  # FP8's blocks stay whole
    if isinstance(weight, form) or rows <= step:
        return form.quantise(weight)
    parts = [form.quantise(weight.rows(at, min(at + step, rows), torch.float32)) for at in range(0, rows, step)]
    return _joined(parts)


def _joined(parts: Sequence[StoredWeight]) -> StoredWeight:
    """The rows of all, which were quantised here, one after the other."""
    first, (codes, scales) = (
        parts[0],
        (
            torch.cat([t.view(torch.uint8) if t.itemsize == 1 else t for t in tensors])
            for tensors in zip(*(part.tensors for part in parts), strict=True)
        ),
    )
    if isinstance(first, Int4Weight):
        return Int4Weight(codes, scales, None, first.group, first.inputs)
    if isinstance(first, Int8Weight):
        return type(first)(codes.view(torch.int8), scales, first.group)
    return Fp8Weight(codes.view(E4M3), scales)


def _format(name: str) -> type[StoredWeight]:
    if name not in FORMATS:
        raise ValueError(f'weight format "{name}" has no kernels; known are {", ".join(FORMATS)}')
    return FORMATS[name]
