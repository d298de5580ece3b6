"""Placements for a changed set of groups or copies, and what must be loaded and freed to get from one placement to the
next. Pure.

These follow what somebody asked for; what the load asks for is decided in cluster/placement/policy.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import PlacementChangeError
from isotherm.cluster.placement.table import Placement


@dataclass(frozen=True)
class Difference:
    """What each group has to load before a placement can be committed, and may free when no shard routes by the old one
    any more."""

    loads: Mapping[str, list[Pair]]
    frees: Mapping[str, list[Pair]]


def difference(old: Placement, new: Placement) -> Difference:
    """Empty lists are left out."""
    loads: dict[str, list[Pair]] = {}
    frees: dict[str, list[Pair]] = {}
    for layer, before, after in zip(old.layers, old.holders, new.holders, strict=True):
        for expert, (had, has) in enumerate(zip(before, after, strict=True)):
            for group in has:
                if group not in had:
                    loads.setdefault(group, []).append((layer, expert))
            for group in had:
                if group not in has:
                    frees.setdefault(group, []).append((layer, expert))
    return Difference(loads, frees)


class _Draft:
    """Holders that can be changed, with each layer's load per group kept up to date. An expert's load is shared evenly
    by its copies. `slots`: experts that a group may hold over all layers; None: any number."""

    def __init__(
        self,
        placement: Placement,
        groups: Sequence[str],
        load: Sequence[Sequence[float]] | None,
        slots: int | None = None,
    ):
        self.placement, self.groups, self.slots = placement, list(groups), slots
        self.holders = [[list(h) for h in experts] for experts in placement.holders]
        self.load = load
        self.totals = {g: 0 for g in {*groups, *placement.groups()}}
        for experts in self.holders:
            for held in experts:
                for group in held:
                    self.totals[group] += 1

    def heat(self, layer: int, expert: int) -> float:
        # Experts that nobody has asked for still count a little, so that they are spread too.
        return 1.0 if self.load is None else self.load[layer][expert] + 1e-3

    def layer_load(self, layer: int) -> dict[str, float]:
        loads = dict.fromkeys(self.groups, 0.0)
        for expert, held in enumerate(self.holders[layer]):
            for group in held:
                if group in loads:
                    loads[group] += self.heat(layer, expert) / len(held)
        return loads

    def with_room(self) -> list[str]:
        """The groups that may hold one more."""
        return [g for g in self.groups if self.slots is None or self.totals[g] < self.slots]

    def add(self, layer: int, expert: int, group: str) -> None:
        self.holders[layer][expert].append(group)
        self.totals[group] += 1

    def drop(self, layer: int, expert: int, group: str) -> None:
        self.holders[layer][expert].remove(group)
        self.totals[group] -= 1

    def finished(self, version: int) -> Placement:
        return Placement(
            version, self.placement.layers, tuple(tuple(tuple(sorted(h)) for h in experts) for experts in self.holders)
        )


def for_groups(
    placement: Placement,
    groups: Sequence[str],
    load: Sequence[Sequence[float]] | None = None,
    slots: int | None = None,
) -> Placement:
    """The placement over exactly these groups, version + 1, with few moves: what a leaving group held alone goes where
    its layer is coolest; a new group takes over experts from the hottest until another move would not help. `load`
    [layers, experts]; None: all alike. None gets more than `slots` experts over all layers, unless all have as many;
    None: there is room for any number."""
    if not groups:
        raise PlacementChangeError("at least one expert group must stay")
    draft = _Draft(placement, groups, load, slots)
    stays = set(groups)
    for layer, experts in enumerate(draft.holders):
        loads = draft.layer_load(layer)
        orphans = []
        for expert, held in enumerate(experts):
            for group in [g for g in held if g not in stays]:
                draft.drop(layer, expert, group)
            if not held:
                orphans.append(expert)
        for expert in sorted(orphans, key=lambda e: -draft.heat(layer, e)):
            coolest = min(draft.with_room() or groups, key=lambda g: (loads[g], draft.totals[g], g))
            draft.add(layer, expert, coolest)
            loads[coolest] += draft.heat(layer, expert)
        _even_out(draft, layer)
    return draft.finished(placement.version + 1)


def _even_out(draft: _Draft, layer: int) -> None:
    """Move experts of one layer from its hottest group to the coolest that has room, while that lowers the hotter of
    the two. Of groups that are equally hot, or equally cool, any that has something to give or to take."""
    experts = draft.holders[layer]
    while open_groups := draft.with_room():
        loads = draft.layer_load(layer)
        most, least = max(loads.values()), min(loads[g] for g in open_groups)
        hot = {g for g in loads if loads[g] >= most * (1 - 1e-9)}
        cool = [g for g in open_groups if loads[g] <= least + most * 1e-9]
        gap = most - least
        # Moving m changes the gap by 2 m: the best m is half the gap, and anything from the gap on makes it worse.
        fitting = [
            (abs(gap / 2 - m), draft.totals[target], target, expert, source)
            for expert, held in enumerate(experts)
            if (m := draft.heat(layer, expert) / len(held)) < gap * (1 - 1e-6)
            for source in hot.intersection(held)
            for target in cool
            if target not in held
        ]
        if not fitting:
            return
        _, _, target, expert, source = min(fitting)
        draft.drop(layer, expert, source)
        draft.add(layer, expert, target)


def with_copies(
    placement: Placement,
    wanted: Sequence[tuple[int, int, int | None]],
    groups: Sequence[str],
    load: Sequence[Sequence[float]] | None = None,
) -> Placement:
    """The placement with `count` copies of each (layer, expert, count), version + 1. Copies come to the coolest groups
    and go from the hottest. A count of None leaves the copies that there are; with no other the placement is the same.
    Raises PlacementChangeError naming the layer, expert or count that cannot be."""
    draft = _Draft(placement, groups, load)
    for layer, expert, count in wanted:
        if layer not in placement.layers:
            raise PlacementChangeError(
                f"copies: layer {layer} has no routed experts; those have: {list(placement.layers)}"
            )
        index = placement.layers.index(layer)
        if not 0 <= expert < len(draft.holders[index]):
            raise PlacementChangeError(
                f"copies: expert {expert} of layer {layer} does not exist; there are {len(draft.holders[index])}"
            )
        if count is None:
            continue
        if not 1 <= count <= len(groups):
            raise PlacementChangeError(
                f"copies: count {count} for layer {layer} expert {expert} must be from 1 to the {len(groups)} expert "
                "groups"
            )
        held = draft.holders[index][expert]
        while len(held) < count:
            loads = draft.layer_load(index)
            draft.add(
                index, expert, min((g for g in groups if g not in held), key=lambda g: (loads[g], draft.totals[g], g))
            )
        while len(held) > count:
            loads = draft.layer_load(index)
            draft.drop(index, expert, max(held, key=lambda g: (loads.get(g, 0.0), draft.totals[g], g)))
    return placement if all(count is None for _, _, count in wanted) else draft.finished(placement.version + 1)
