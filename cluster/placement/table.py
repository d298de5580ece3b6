"""Which groups hold a copy of which expert: an immutable, versioned table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """`holders[i][e]` names the groups, at least one, that hold expert e of the i-th MoE layer, which is decoder layer
    `layers[i]`."""

    version: int
    layers: tuple[int, ...]
    holders: tuple[tuple[tuple[str, ...], ...], ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.holders):
            raise ValueError(f"{len(self.layers)} layers but holders of {len(self.holders)}")
        for layer, experts in zip(self.layers, self.holders, strict=True):
            for expert, groups in enumerate(experts):
                if not groups or len(set(groups)) != len(groups):
                    raise ValueError(
                        f"layer {layer} expert {expert}: holders {list(groups)} must be one or more distinct groups"
                    )

    @property
    def shape(self) -> tuple[int, int]:
        """MoE layers, and experts of each."""
        return len(self.layers), max(map(len, self.holders), default=0)

    @property
    def experts(self) -> int:
        """Of all layers together, whatever number of copies each has."""
        return sum(map(len, self.holders))

    def groups(self) -> tuple[str, ...]:
        """Every group that holds something, in order of name."""
        return tuple(sorted({g for experts in self.holders for groups in experts for g in groups}))

    def held_by(self, group: str) -> list[tuple[int, int]]:
        """(layer, expert) pairs of one group, in order."""
        return [
            (layer, e)
            for layer, experts in zip(self.layers, self.holders, strict=True)
            for e, groups in enumerate(experts)
            if group in groups
        ]

    def orphans(self, lost: Collection[str]) -> int:
        """How many (layer, expert) pairs only these groups hold."""
        gone = frozenset(lost)
        return sum(gone.issuperset(groups) for experts in self.holders for groups in experts) if gone else 0


def contiguous_placement(layers: Sequence[int], experts: int, groups: Sequence[str], version: int = 1) -> Placement:
    """One copy of each expert, every layer's experts cut into equal runs over the groups."""
    if not groups:
        raise ValueError("a model with routed experts needs at least one expert group")
    row = tuple((groups[e * len(groups) // experts],) for e in range(experts))
    return Placement(version, tuple(layers), tuple(row for _ in layers))
