"""FP8 as DeepSeek-V3 stores it (arXiv:2412.19437, §3.3): e4m3 with one scale for each block of 128×128, in float32, or
since V3.1 a power of two, which may be stored as E8M0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from isotherm.cluster.model.formats.base import FLOATS, Wanted, WeightFormat

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields

BLOCK = 128
E4M3, E8M0 = "F8_E4M3", "F8_E8M0"


@dataclass(frozen=True)
class Fp8Blocks(WeightFormat):
    """Weight = data × scale of its block."""

    name = "fp8"
    leaves: ClassVar = {"data": "weight", "scale": "weight_scale_inv"}
    quant_methods: ClassVar[tuple[str, ...]] = ("fp8",)
    least_bytes = 1.0

    @classmethod
    def configured(cls, q: Fields) -> Fp8Blocks:
        """`activation_scheme` and `scale_fmt` are about activations, which are not quantised here: "static" ones would
        come with scales that nothing applies. Which modules are not converted, the tensors themselves say."""
        q.exactly("fmt", ("e4m3",), "e4m3")
        q.exactly("weight_block_size", ([BLOCK, BLOCK],), None)
        q.exactly("activation_scheme", ("dynamic", None), "dynamic")
        q.exactly("scale_fmt", ("ue8m0", "float", None), None)
        plain = q.value("modules_to_not_convert", None)
        if plain is not None and not (isinstance(plain, list) and all(isinstance(name, str) for name in plain)):
            raise q.fail("modules_to_not_convert", plain, "null or a list of the names of modules")
        return cls()

    def words(self) -> str:
        return f"FP8 e4m3, {BLOCK}×{BLOCK} blocks"

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        return {"data": Wanted(shape, (E4M3,)), "scale": Wanted(tuple(-(-n // BLOCK) for n in shape), (*FLOATS, E8M0))}

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return dtypes["data"] == E4M3 if dtypes.get("data") else "scale" in dtypes


class CompressedFp8Blocks(Fp8Blocks):
    """The same blocks under compressed-tensors' names."""

    leaves: ClassVar = {"data": "weight", "scale": "weight_scale"}
    quant_methods = ()

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return dtypes.get("data") in (E4M3, "") and "scale" in dtypes
