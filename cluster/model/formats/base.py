"""What a weight format says of a stored weight: which tensors it is made of, how large they are, how it is recognised.
How it is computed with stands in kernels/formats, under the same name. Reads no tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, ClassVar

from isotherm.cluster.jsontypes import JSON

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors' words and in torch's
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
              "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What one tensor of a weight must be. `dtypes`: safetensors' names of those that are read."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class WeightFormat(ABC):
    """One way to store a weight [N, K]. Formats with parameters are frozen dataclasses: the parameters are fields."""

    name: ClassVar[str]  # key of kernels/formats/registry.py
    # Role → the tensor's name, where the weight's own last name is "weight". The first role is the one that is always
    # there, and that messages name. What `wants` does not say of a role, `optional` does.
    leaves: ClassVar[dict[str, str]]
    quant_methods: ClassVar[tuple[str, ...]] = ()  # config.json's words for it
    needs_config: ClassVar[bool] = False  # whether the headers alone cannot say it
    # The least that a weight takes in memory, in bytes an element: what has no kernels of its own is widened to bf16,
    # which the native kernels keep in three quarters (kernels/native/csrc/coded.cpp).
    least_bytes: ClassVar[float] = 1.48

    @classmethod
    def configured(cls, q: Fields) -> WeightFormat:
        """As config.json's quantization_config describes it. Raises ModelConfigError for what is not supported."""
        return cls()

    @property
    def parameters(self) -> JSON:
        """What config.json says of it beside its name, as the kernels are told."""
        return asdict(self) if is_dataclass(self) else {}

    @abstractmethod
    def words(self) -> str:
        """For `isotherm inspect` and messages."""

    @abstractmethod
    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        """Role → tensor that a weight of `shape` must have."""

    def optional(self, shape: tuple[int, ...]) -> dict[str, tuple[Wanted, ...]]:
        """Role → what a tensor must be, of which a weight of `shape` may have none: one of several layouts, which are
        told apart by their dtypes. Every role that `wants` leaves out is here."""
        return {}

    @abstractmethod
    def stores(self, dtypes: Mapping[str, str]) -> bool:
        """Whether a weight is in this format, of whose tensors those in `dtypes` (role → dtype) are there. A dtype is
        empty where only the index is here, which has none."""

    def refusal(self, read: Mapping[str, Callable[[], bytes]]) -> str | None:
        """Why a weight cannot be computed with that has the right headers. `read`: role → its tensor's bytes, where the
        tensor is there. Asked of one weight of a checkpoint, before others are read."""
        return None

    @classmethod
    def tensor_name(cls, weight: str, role: str) -> str:
        """Name of a tensor of `weight`."""
        module, _, last = weight.rpartition(".")
        leaf = cls.leaves[role].replace("weight", last, 1)
        return f"{module}.{leaf}" if module else leaf

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a weight of `shape`, each tensor in the first of its dtypes."""
        return sum(math.prod(w.shape) * ITEM_BYTES[w.dtypes[0]] for w in self.wants(shape).values())
