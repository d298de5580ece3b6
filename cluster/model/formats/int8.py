"""Eight-bit integers with one scale for each group of inputs, as compressed-tensors' `int-quantized` names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from isotherm.cluster.model.formats.base import Wanted, WeightFormat

GROUP = 32


@dataclass(frozen=True)
class Int8Groups(WeightFormat):
    """Weight = integer × scale of its output and group; -127 … 127."""

    name = "int8"
    leaves: ClassVar = {"data": "weight", "scales": "weight_scale"}
    least_bytes = 1 + 2 / GROUP

    @property
    def parameters(self) -> dict[str, int]:
        return {"group": GROUP}

    def words(self) -> str:
        return f"8-bit integers, groups of {GROUP}"

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        groups = -(-shape[1] // GROUP)
        return {"data": Wanted(shape, ("I8",)), "scales": Wanted((shape[0], groups), ("BF16", "F16", "F32"))}

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return dtypes.get("data") == "I8" or (dtypes.get("data") == "" and "scales" in dtypes)
