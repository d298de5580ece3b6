"""Which group each expert that is to be loaded somewhere can be copied from. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.placement.table import Placement


def copy_sources(
    pairs: Iterable[Pair], placement: Placement, peers: Sequence[str], near: Collection[str]
) -> dict[str, list[Pair]]:
    """Pairs by the peer that has them. Of several that hold a pair, those `near` (on the same node) come first, then
    whoever has been given least. Pairs that none of the peers holds are left out."""
    row_of = {layer: row for row, layer in enumerate(placement.layers)}
    known, found = set(peers), dict[str, list[Pair]]()
    for layer, expert in pairs:
        row = row_of.get(layer)
        holders = [] if row is None else [group for group in placement.holders[row][expert] if group in known]
        if holders:
            best = min(holders, key=lambda group: (group not in near, len(found.get(group, ())), group))
            found.setdefault(best, []).append((layer, expert))
    return found
