"""MXFP4 (OCP Microscaling Formats 1.0): e2m1 numbers, two a byte, with a power of two for each 32 inputs, under
compressed-tensors' names and under those of AMD's Quark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from isotherm.cluster.model.formats.base import Wanted, WeightFormat

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields

GROUP = 32


@dataclass(frozen=True)
class Mxfp4(WeightFormat):
    """Weight = number × 2^(scale - 127). Every such product is a bfloat16 number, and as that it is computed with."""

    name = "mxfp4"
    leaves: ClassVar = {"packed": "weight_packed", "scale": "weight_scale"}
    needs_config = True

    def words(self) -> str:
        return "MXFP4, computed with as bfloat16"

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        return {
            "packed": Wanted((shape[0], -(-shape[1] // 2)), ("U8",)),
            "scale": Wanted((shape[0], -(-shape[1] // GROUP)), ("U8", "F8_E8M0")),
        }

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return dtypes["packed"] in ("U8", "") and "scale" in dtypes if "packed" in dtypes else False


class QuarkMxfp4(Mxfp4):
    """As Quark writes it."""

    leaves: ClassVar = {"packed": "weight", "scale": "weight_scale"}
    quant_methods = ("quark",)

    @classmethod
    def configured(cls, q: Fields) -> WeightFormat:
        default = q.raw.get("global_quant_config")
        weight = default.get("weight") if isinstance(default, dict) else None
        if not isinstance(weight, dict):
            raise q.fail("global_quant_config", default, 'an object with "weight"')
        w = type(q)(weight, f"{q.where}: global_quant_config.weight")
        w.exactly("dtype", ("fp4",), None)
        w.exactly("group_size", (GROUP,), None)
        w.exactly("scale_format", ("e8m0",), "e8m0")
        return cls()
