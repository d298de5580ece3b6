"""GPTQ's layout, which AutoRound writes too: four-bit integers, eight in an int32 along a weight's inputs, the weight
lying transposed, with a scale and a zero point for each group of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from isotherm.cluster.model.formats.base import Wanted, WeightFormat
from isotherm.cluster.model.formats.compressed import ACT_ORDER, GROUPS, SCALES, in_order

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields

# What the first version of the layout stores is a zero point less one; "gptq_v2" stores the zero point.
OFFSETS = {"gptq": 1, "gptq_v2": 0}
# AutoRound's words for the two (auto_round/inference/backend.py tells them apart).
AUTO_ROUND_OFFSETS = {"auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}
# What is said of layers that are stored otherwise than the rest: GPTQModel's word for it and AutoRound's. A pattern of
# GPTQModel's that begins with NOT_QUANTISED names layers that are in no such format.
BY_LAYER, NOT_QUANTISED = ("dynamic", "extra_config"), "-:"
UNQUANTISED_BITS = 16  # from which on AutoRound leaves a layer as it is


@dataclass(frozen=True)
class Gptq(WeightFormat):
    """Weight = (nibble - zero) × scale. `zero_offset`: what is added to a stored zero point."""

    group_size: int = 128
    zero_offset: int = 1

    name = "gptq"
    leaves: ClassVar = {"packed": "qweight", "zero": "qzeros", "scale": "scales", "index": "g_idx"}
    quant_methods: ClassVar[tuple[str, ...]] = ("gptq",)
    needs_config = True

    @classmethod
    def configured(cls, q: Fields) -> WeightFormat:
        name = "checkpoint_format" if "checkpoint_format" in q.raw else "format"
        q.exactly(name, tuple(OFFSETS), "gptq")
        return cls._configured(q, OFFSETS[q.raw.get(name, "gptq")])

    @classmethod
    def _configured(cls, q: Fields, zero_offset: int) -> WeightFormat:
        q.exactly("bits", (4,), None)
        q.exactly("group_size", GROUPS, None)
        q.boolean("sym", True)
        q.boolean("desc_act", False)
        for field in BY_LAYER:
            _check_layers(q, field)
        return cls(q.raw["group_size"], zero_offset)

    @property
    def least_bytes(self) -> float:  # type: ignore[override]  # a property of the group, where others have a number
        return 0.5 + 1 / self.group_size

    def words(self) -> str:
        return f"GPTQ, 4-bit integers, groups of {self.group_size}"

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        rows, inputs = shape
        groups = -(-inputs // self.group_size)
        return {
            "packed": Wanted((-(-inputs // 8), rows), ("I32",)),
            "zero": Wanted((groups, -(-rows // 8)), ("I32",)),
            "scale": Wanted((groups, rows), SCALES),
        }

    def optional(self, shape: tuple[int, ...]) -> dict[str, tuple[Wanted, ...]]:
        return {"index": (Wanted((shape[1],), ("I32",)),)}

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return "packed" in dtypes

    def refusal(self, read: Mapping[str, Callable[[], bytes]]) -> str | None:
        return None if "index" not in read or in_order(read["index"](), self.group_size) else ACT_ORDER


class AutoRound(Gptq):
    """The same, in AutoRound's words."""

    quant_methods = ("auto-round", "intel/auto-round")

    @classmethod
    def configured(cls, q: Fields) -> WeightFormat:
        name = "packing_format" if "packing_format" in q.raw else "backend"
        q.exactly(name, tuple(AUTO_ROUND_OFFSETS), None)
        q.exactly("data_type", ("int",), "int")
        return cls._configured(q, AUTO_ROUND_OFFSETS[q.raw[name]])


def _check_layers(q: Fields, field: str) -> None:
    """That what `field` says of single layers leaves the quantised ones as the rest are: a checkpoint is read with one
    width and one size of groups."""
    layers = q.raw.get(field)
    if layers is None:
        return
    if not isinstance(layers, dict):
        raise q.fail(field, layers, "null or an object")
    where, group_size = f"{q.where}: {field}", q.raw["group_size"]
    for layer, said in layers.items():
        if layer.startswith(NOT_QUANTISED):
            continue
        if not isinstance(said, dict):
            raise type(q)(layers, where).fail(layer, said, "an object")
        w = type(q)(said, f"{where}: {layer}", null_is_absent=True)
        bits, groups = w.value("bits", 4), w.value("group_size", group_size)
        if isinstance(bits, int) and bits >= UNQUANTISED_BITS:
            continue
        if bits != 4:
            raise w.fail("bits", bits, f"4, or {UNQUANTISED_BITS} and above")
        if groups != group_size:
            raise w.fail("group_size", groups, f"{group_size}, as in the other layers")
        w.exactly("data_type", ("int",), "int")
