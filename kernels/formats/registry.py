"""Every weight format that the kernels can compute with, by the name that cluster/model/formats gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import Int4Weight, Int8Weight
from isotherm.kernels.formats.published import PUBLISHED
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight

FORMATS: dict[str, type[StoredWeight]] = {f.name: f for f in (PlainWeight, Fp8Weight, Int4Weight, Int8Weight)}


def stored_weight(name: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> StoredWeight:
    """A weight of role → tensor, which a checkpoint stores in the format `name`."""
    if (read := PUBLISHED.get(name)) is not None:
        return read(tensors, parameters)
    return _format(name).of(tensors, parameters)


def quantised(name: str, weight: StoredWeight) -> StoredWeight:
    """`weight` in the format `name`."""
    return _format(name).quantise(weight)


def _format(name: str) -> type[StoredWeight]:
    if name not in FORMATS:
        raise ValueError(f'weight format "{name}" has no kernels; known are {", ".join(FORMATS)}')
    return FORMATS[name]
