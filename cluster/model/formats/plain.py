"""A weight that is its numbers: one tensor in float32, float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from isotherm.cluster.model.formats.base import FLOATS, Wanted, WeightFormat


class Plain(WeightFormat):
    """What every tensor is in that is in no other format."""

    name = "plain"
    leaves: ClassVar = {"data": "weight"}

    def words(self) -> str:
        return " or ".join(FLOATS.values())

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        return {"data": Wanted(shape, tuple(FLOATS))}

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return True
