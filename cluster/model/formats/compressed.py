"""compressed-tensors' `pack-quantized`: four-bit integers, eight in an int32 along a weight's inputs, with one scale
for each group of inputs; and what config.json says in its words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from isotherm.cluster.model.formats.base import Wanted, WeightFormat
from isotherm.cluster.model.formats.fp8 import BLOCK, CompressedFp8Blocks
from isotherm.cluster.model.formats.int8 import GROUP as INT8_GROUP
from isotherm.cluster.model.formats.int8 import Int8Groups
from isotherm.cluster.model.formats.mxfp4 import Mxfp4

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields

GROUPS = (32, 64, 128)
SCALES = ("BF16", "F16", "F32")
METHOD = "compressed-tensors"
INT8_FORMAT, MIXED = "int-quantized", "mixed-precision"  # mixed: each group says its own, or its tensors do
# Orders in which a weight was quantised that leave its inputs where they are. Others need the activations reordered.
HARMLESS_ORDERS = (None, False, "weight", "static")


@dataclass(frozen=True)
class PackQuantized(WeightFormat):
    """Weight = (nibble - zero) × scale; zero is 8 where no zero points are there."""

    group_size: int = 32

    name = "pack-quantized"
    leaves: ClassVar = {
        "packed": "weight_packed",
        "scale": "weight_scale",
        "shape": "weight_shape",
        "zero": "weight_zero_point",
        "index": "weight_g_idx",
    }
    quant_methods = (METHOD,)
    needs_config = True

    @classmethod
    def configured(cls, q: Fields) -> WeightFormat:
        return read_config(q)

    @property
    def least_bytes(self) -> float:  # type: ignore[override]  # a property of the group, where others have a number
        return 0.5 + 1 / self.group_size

    def words(self) -> str:
        return f"4-bit integers, groups of {self.group_size}"

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        return {
            "packed": Wanted((shape[0], -(-shape[1] // 8)), ("I32",)),
            "scale": Wanted((shape[0], -(-shape[1] // self.group_size)), SCALES),
            "shape": Wanted((2,), ("I64", "I32")),
        }

    def optional(self, shape: tuple[int, ...]) -> dict[str, tuple[Wanted, ...]]:
        """Zero points are packed along the outputs; before compressed-tensors' pull request 296 (April 2025) they were
        stored one by one and signed, which is 8 less than what they are beside nibbles from 0 to 15."""
        groups = -(-shape[1] // self.group_size)
        packed, plain = Wanted((-(-shape[0] // 8), groups), ("I32",)), Wanted((shape[0], groups), ("I8",))
        return {"zero": (packed, plain), "index": (Wanted((shape[1],), ("I32",)),)}

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return dtypes["packed"] in ("I32", "") if "packed" in dtypes else False

    def refusal(self, read: Mapping[str, Callable[[], bytes]]) -> str | None:
        return None if "index" not in read or in_order(read["index"](), self.group_size) else ACT_ORDER


ACT_ORDER = (
    "is quantised in act-order: its g_idx deals inputs out to groups in another order than their own, which is not "
    "supported; take a checkpoint that was made without desc_act (actorder)"
)


def in_order(index: bytes, group: int) -> bool:
    """Whether g_idx, as int32, gives each input the group that it lies in."""
    return all(value == i // group for i, value in enumerate(memoryview(index).cast("i")))


def read_config(q: Fields) -> WeightFormat:
    """The format of the groups of a compressed-tensors `quantization_config`. Weights in 8 bits beside those in 4 are
    known by their tensors, and so is what "ignore" names. Raises ModelConfigError for what is not supported."""
    groups = q.raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise q.fail("config_groups", groups, "an object with at least one group")
    transforms = q.raw.get("transform_config")
    if transforms and transforms != {"config_groups": {}}:
        raise q.fail("transform_config", transforms, "null or empty: rotations of activations are not computed")
    found: list[WeightFormat] = []
    for name, group in groups.items():
        where = f"{q.where}: config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise type(q)(groups, q.where).fail(name, group, 'an object with "weights"')
        g = type(q)(group, where)
        _check_activations(g)
        found.append(_of_group(type(q)(group["weights"], f"{where}.weights")))
        if isinstance(found[-1], Int8Groups):
            _check_int_quantized(q, g)
    narrow = {f for f in found if not isinstance(f, CompressedFp8Blocks | Int8Groups)}
    if len(narrow) > 1:
        words = " and ".join(sorted(f.words() for f in narrow))
        raise q.fail("config_groups", words, "groups that are alike, where they have 4 bits")
    return next(iter(narrow), found[0])


def _of_group(w: Fields) -> WeightFormat:
    kind = (w.raw.get("type"), w.raw.get("num_bits"))
    if kind == ("float", 8):
        w.exactly("strategy", ("block",), None)
        w.exactly("block_structure", ([BLOCK, BLOCK],), None)
        return CompressedFp8Blocks()
    if kind == ("int", 8):
        w.exactly("strategy", ("group",), None)
        w.exactly("group_size", (INT8_GROUP,), None)
        w.exactly("symmetric", (True,), None)
        return Int8Groups()
    if kind == ("float", 4):
        w.exactly("group_size", (32,), None)
        return Mxfp4()
    w.exactly("type", ("int",), "int")
    w.exactly("num_bits", (4,), None)
    w.exactly("strategy", ("group",), None)
    w.exactly("group_size", GROUPS, None)
    order: Any = w.raw.get("actorder")
    if order not in HARMLESS_ORDERS:
        raise w.fail("actorder", order, "null, or an order that leaves the inputs where they are (act-order does not)")
    return PackQuantized(w.raw["group_size"])


def _check_int_quantized(q: Fields, g: Fields) -> None:
    """That a group of 8-bit integers, which might be packed, is not: by what it says itself, or else by what the config
    `q` says of all groups."""
    said, allowed = (q, (INT8_FORMAT, MIXED)) if g.raw.get("format") is None else (g, (INT8_FORMAT,))
    if (form := said.raw.get("format")) not in allowed:
        words = " or ".join(f'"{word}"' for word in allowed)
        raise said.fail("format", form, f"{words} where integers have 8 bits")


def _check_activations(g: Fields) -> None:
    """Activations are never quantised here; what was calibrated for fixed scales of theirs is refused."""
    inputs = g.raw.get("input_activations")
    if inputs is not None and not (isinstance(inputs, dict) and inputs.get("dynamic") in (True, "local")):
        raise g.fail("input_activations", inputs, "null, or dynamic")
