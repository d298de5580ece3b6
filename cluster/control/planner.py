"""What the fleet is to be: the workers by name, the placement over the groups, and what was promised
about both. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import Target
from isotherm.cluster.messages.workers import ATTENTION, EXPERT, number_of, role_of
from isotherm.cluster.placement.changes import difference, for_groups, with_copies
from isotherm.cluster.placement.table import Placement, contiguous_placement


class Workers(Protocol):
    """The workers that there are, by name."""

    placement: Placement

    def group_names(self) -> list[str]: ...

    def shard_names(self) -> list[str]: ...

    def alive(self, workers: Iterable[str]) -> list[str]:
        """Those of the named workers that have not died."""

    def node_of(self, worker: str) -> str | None:
        """Ray's id of the node it runs on."""

    def expert_load(self) -> list[list[float]] | None:
        """Rows per second of each (layer, expert); None: not known."""

    def slots(self, groups: int) -> int | None:
        """Experts over all layers that a group has room for where there are so many; None: any number."""


@dataclass(frozen=True)
class Desired:
    """The fleet as it is to be."""

    groups: tuple[str, ...]
    shards: tuple[str, ...]
    placement: Placement
    drained: frozenset[str] = frozenset()  # nodes that are to have none of them
    pinned: frozenset[Pair] = frozenset()  # experts whose number of copies an operator has set

    @property
    def size(self) -> tuple[int, int]:
        """Groups and shards."""
        return len(self.groups), len(self.shards)


class Planner:
    """Names workers, and says what the fleet is to be; changes nothing but the numbers of names."""

    def __init__(self, workers: Workers):
        self._workers = workers
        self.numbers = {EXPERT: 0, ATTENTION: 0}  # of the next new worker; names are never used again

    def new_names(self, role: str, count: int) -> tuple[str, ...]:
        names = self._names([], role, count)
        self.use_names(names)
        return names

    def use_names(self, names: Iterable[str]) -> None:
        """These names are taken, whatever becomes of their workers."""
        for name in names:
            role = role_of(name)
            self.numbers[role] = max(self.numbers[role], number_of(name) + 1)

    def aim(self, now: Desired, target: Target, reserved: Sequence[str] = ()) -> Desired:
        """The fleet that meets an operation's target; `reserved`: names of new workers that have a place. Raises
        PlacementChangeError for copies that cannot be. Workers that are not in `now` are leaving, or were never
        committed: they do not count."""
        workers = self._workers
        drained = now.drained if target.drain_nodes is None else frozenset(target.drain_nodes)
        all_groups, all_shards = self._members(now)
        have_groups = [g for g in all_groups if workers.node_of(g) not in drained]
        have_shards = [s for s in all_shards if workers.node_of(s) not in drained]
        groups = self._names(have_groups, EXPERT, target.expert_groups or len(all_groups), reserved)
        shards = self._names(have_shards, ATTENTION, target.attention_shards or len(all_shards), reserved)
        placement = workers.placement
        if set(groups) != set(all_groups):
            placement = for_groups(placement, groups, workers.expert_load(), workers.slots(len(groups)))
        if target.copies:
            placement = with_copies(
                placement, [(c.layer, c.expert, c.count) for c in target.copies], groups, workers.expert_load()
            )
        pins = {(c.layer, c.expert): c.count is not None for c in target.copies}
        pinned = {pair for pair in now.pinned if pins.get(pair, True)} | {pair for pair, stays in pins.items() if stays}
        return Desired(groups, shards, placement, drained, frozenset(pinned))

    def heal(self, now: Desired, replace: bool) -> Desired:
        """The fleet without its dead, with as many new workers, or (`replace` false) with what is left of it, as long
        as that is anything. Only those in `now` are replaced."""
        workers = self._workers
        have_groups, have_shards = self._members(now)
        groups, shards = workers.alive(have_groups), workers.alive(have_shards)
        if replace or not groups:
            groups += self._names([], EXPERT, len(have_groups) - len(groups))
        if replace or not shards:
            shards += self._names([], ATTENTION, len(have_shards) - len(shards))
        placement = workers.placement
        if set(placement.groups()) - set(groups) or set(groups) - set(have_groups):
            placement = for_groups(placement, groups, workers.expert_load(), workers.slots(len(groups)))
        return Desired(tuple(groups), tuple(shards), placement, now.drained, now.pinned)

    def _members(self, now: Desired) -> tuple[list[str], list[str]]:
        """Groups and shards that there are and that were committed."""
        workers = self._workers
        groups = [g for g in workers.group_names() if g in now.groups]
        return groups, [s for s in workers.shard_names() if s in now.shards]

    def first(self, shards: int, groups: int, layers: Sequence[int], experts: int) -> Desired:
        """What a cluster begins with; where no layer has routed experts there are no groups."""
        named_shards = self.new_names(ATTENTION, shards)
        named = self.new_names(EXPERT, groups) if layers else ()
        placement = contiguous_placement(layers, experts, named) if named else Placement(1, (), ())
        return Desired(named, named_shards, placement)

    def twin(self, now: Desired, target: Target) -> Desired:
        """New workers alone, as many as there are or as the target says. Where there are as many groups, the experts of
        another model have as many copies as those of this one, each in the place of one; else each has one."""
        groups = self._names([], EXPERT, (target.expert_groups if now.groups else None) or len(now.groups))
        shards = self._names([], ATTENTION, target.attention_shards or len(now.shards))
        before, version = now.placement, now.placement.version + 1
        if len(groups) != len(now.groups):
            placement = contiguous_placement(before.layers, len(before.holders[0]), groups, version)
            return Desired(groups, shards, placement, now.drained)
        successor = dict(zip(now.groups, groups, strict=True))
        holders = tuple(tuple(tuple(successor[g] for g in held) for held in experts) for experts in before.holders)
        return Desired(groups, shards, Placement(version, before.layers, holders), now.drained, now.pinned)

    def new(self, desired: Desired) -> list[str]:
        """Workers that have to be started."""
        have = {*self._workers.group_names(), *self._workers.shard_names()}
        return [w for w in (*desired.groups, *desired.shards) if w not in have]

    def describe(self, now: Desired, desired: Desired) -> list[str]:
        """What has to be done, a line each."""
        workers = self._workers
        lines = [f"start {w}" for w in self.new(desired)]
        change = difference(workers.placement, desired.placement)
        lines += [f"load {len(pairs)} experts on {group}" for group, pairs in sorted(change.loads.items())]
        if desired.placement != workers.placement:
            lines.append(f"commit placement version {desired.placement.version}")
        lines += [
            f"free {len(pairs)} experts on {group}"
            for group, pairs in sorted(change.frees.items())
            if group in desired.groups
        ]
        if released := now.pinned - desired.pinned:
            lines.append(f"leave the copies of {len(released)} experts to the autoscaler")
        lines += [f"drain and end {s}" for s in workers.shard_names() if s not in desired.shards]
        return lines + [f"end {g}" for g in workers.group_names() if g not in desired.groups]

    def _names(self, have: list[str], role: str, count: int, reserved: Sequence[str] = ()) -> tuple[str, ...]:
        """`count` names: the oldest of those there are, then those that have a place, then new ones that were never
        used."""
        kept = [*sorted(have, key=number_of), *(name for name in reserved if role_of(name) == role)][:count]
        return tuple(kept + [f"{role}-{self.numbers[role] + i}" for i in range(count - len(kept))])
