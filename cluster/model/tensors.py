"""What a checkpoint must hold: tensors with their shapes, and the part of a model that each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Part(str, Enum):
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE_MLP = "dense MLP"
    ROUTER = "router"
    SHARED_EXPERTS = "shared experts"
    ROUTED_EXPERTS = "routed experts"
    HEAD = "output head"
    MTP = "multi-token prediction"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that must be there. `quantisable`: a projection, which may be stored in any weight format; then
    the name is that of the weight, of which the format makes its tensors' names."""

    name: str
    shape: tuple[int, ...]
    part: Part
    quantisable: bool = False
    # (n, of): the first n of every `of` rows are multiplied by transposed too (absorbed MLA's kv_b_proj: the part of
    # a head that makes keys). Groups of inputs have a meaning in one direction alone.
    both_ways: tuple[int, int] | None = None


def mlp_projections(p: str) -> tuple[str, str, str]:
    """Names of an MLP's weights: gate, up and down projection."""
    return f"{p}.gate_proj.weight", f"{p}.up_proj.weight", f"{p}.down_proj.weight"


def mlp_tensors(names: tuple[str, str, str], hidden: int, inner: int, part: Part) -> Iterator[TensorSpec]:
    """Of an MLP whose gate, up and down projections have these names."""
    gate, up, down = names
    yield TensorSpec(gate, (inner, hidden), part, quantisable=True)
    yield TensorSpec(up, (inner, hidden), part, quantisable=True)
    yield TensorSpec(down, (hidden, inner), part, quantisable=True)
