"""In how many bits weights are kept, whatever the checkpoint stores: as it stores them, or quantised while they are
read. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.model.tensors import Part, TensorSpec

STORED = "stored"
# Field → its values, of the manifest too. A form's name is its key of kernels/formats/registry.py.
FORMS = {
    "experts": (STORED, "int4"),
    "dense": (STORED, "fp8", "int4"),
    "head": (STORED, "fp8", "int8", "int6", "int4"),
}
# The least that an element takes in memory, in bytes: codes, and scales of groups of 32, of two bytes or of one.
LEAST_BYTES = {"fp8": 1.0, "int8": 1 + 2 / 32, "int6": 0.75 + 2 / 32, "int4": 0.5 + 1 / 32}


class WeightChoiceError(IsothermError, ValueError):
    """What is no choice; names the field, the value and what would be right."""


@dataclass(frozen=True)
class WeightChoice:
    """`experts`: the routed experts; `dense`: attention, dense MLPs and shared experts; `head`: the output head.
    Embedding, router and norms stay as they are stored, and so does what is in the chosen form already."""

    experts: str = STORED
    dense: str = STORED
    head: str = STORED

    def __post_init__(self) -> None:
        for field, allowed in FORMS.items():
            if (value := getattr(self, field)) not in allowed:
                raise WeightChoiceError(f'{field} is "{value}"; it must be {", ".join(allowed[:-1])} or {allowed[-1]}')

    def with_changes(self, experts: str | None, dense: str | None, head: str | None) -> WeightChoice:
        """With those that are not None in place of its own. Raises WeightChoiceError."""
        return WeightChoice(experts or self.experts, dense or self.dense, head or self.head)

    def form(self, spec: TensorSpec) -> str:
        """In which form a weight is kept."""
        if not spec.quantisable:
            return STORED
        if spec.part is Part.ROUTED_EXPERTS:
            return self.experts
        if spec.part is Part.HEAD:
            return self.head
        return self.dense

    @property
    def is_stored(self) -> bool:
        """Whether nothing is quantised."""
        return self == WeightChoice()

    @property
    def words(self) -> str:
        """ "stored", or what is not, as `experts int4, head fp8`."""
        chosen = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != STORED]
        return ", ".join(chosen) or STORED

    @property
    def kept(self) -> str:
        """`words` for a fingerprint, with how they are meant, for a worker that takes them as they once were has other
        bits: `dense: int4` has been FP8 for what is multiplied by in both directions, and int4 has had scales of
        bfloat16's precision."""
        both_ways = ["both ways"] if self.dense == "int4" else []
        short = ["short scales"] if "int4" in (self.experts, self.dense, self.head) else []
        return ", ".join([self.words, *both_ways, *short])
