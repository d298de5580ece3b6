"""A fleet of workers that is only a table: what each holds, and by which placement each routes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import OperationLog
from isotherm.cluster.placement.table import Placement, contiguous_placement

LAYERS, EXPERTS = (1, 2), 8


class TableFleet:
    """What each worker holds and routes by. `fails` names calls that raise, as "load expert-2"."""

    def __init__(self, groups: Iterable[str], shards: Iterable[str]):
        groups = list(groups)
        self.placement = contiguous_placement(LAYERS, EXPERTS, groups)
        self.experts = {g: set(self.placement.held_by(g)) for g in groups}
        self.routes: dict[str, Placement | None] = dict.fromkeys(shards, self.placement)
        self.links = {(s, g) for s in self.routes for g in groups}
        self.avoid: frozenset[str] = frozenset()
        self.waits: dict[str, str] = {}
        self.nodes: dict[str, str] = {}  # worker → node; "aa" where it is not named
        self.places: dict[str, str] = {}  # reserved: worker → node
        self.dead: set[str] = set()
        self.fails: set[str] = set()
        self.full = False  # no group finds a place
        self.calls: list[str] = []

    def _call(self, *words: str) -> None:
        self.calls.append(" ".join(words))
        if self.calls[-1] in self.fails or words[1] in self.dead:
            raise RuntimeError(f"{self.calls[-1]} does not work")

    def group_names(self) -> list[str]:
        return list(self.experts)

    def shard_names(self) -> list[str]:
        return list(self.routes)

    def alive(self, workers: Iterable[str]) -> list[str]:
        return [w for w in workers if w not in self.dead]

    def node_of(self, worker: str) -> str:
        return self.nodes.get(worker, "aa")

    def expert_load(self) -> None:
        return None

    def slots(self, groups: int) -> None:
        return None

    async def reserve(self, worker: str, avoid: frozenset[str]) -> None:
        while self.full and worker.startswith("expert"):
            await asyncio.sleep(0.01)
        self.places[worker] = "bb" if "aa" in avoid else "aa"

    def release(self, worker: str) -> None:
        self.places.pop(worker, None)

    async def start_group(self, name: str) -> None:
        self._call("start", name)
        if name not in self.places:
            await self.reserve(name, self.avoid)
        self.nodes[name] = self.places.pop(name)
        self.experts[name] = set()

    async def start_shard(self, name: str) -> None:
        self._call("start", name)
        if name not in self.places:
            await self.reserve(name, self.avoid)
        self.nodes[name] = self.places.pop(name)
        self.routes[name] = None

    async def link(self, shard: str, group: str) -> None:
        self._call("link", shard, group)
        self.links.add((shard, group))

    async def load(self, group: str, pairs: list[Pair]) -> None:
        self.experts[group] |= set(pairs[:1])
        self._call("load", group)
        self.experts[group] |= set(pairs)

    async def loaded(self) -> dict[str, int]:
        return {}

    async def free(self, group: str, pairs: list[Pair]) -> None:
        if group in self.dead:
            return
        self._call("free", group)
        assert not any(routes and set(pairs) & set(routes.held_by(group)) for routes in self.routes.values()), (
            "a shard still routes there"
        )
        self.experts[group] -= set(pairs)

    async def held(self, group: str) -> list[Pair]:
        self._call("held", group)
        return sorted(self.experts[group])

    async def adopt(self, shard: str, placement: Placement) -> None:
        if shard in self.dead:
            return
        self._call("adopt", shard)
        assert all(
            (shard, g) in self.links and (g in self.dead or set(placement.held_by(g)) <= self.experts[g])
            for g in placement.groups()
        )
        self.routes[shard] = placement

    async def leave_service(self, shard: str, seconds: float) -> None:
        if shard not in self.dead:
            self._call("drain", shard)

    async def disconnect(self, shard: str, group: str) -> None:
        self._call("disconnect", shard, group)
        self.links.discard((shard, group))

    async def end(self, worker: str) -> None:
        self._call("end", worker) if worker not in self.dead else None
        self.dead.discard(worker)
        self.experts.pop(worker, None)
        self.routes.pop(worker, None)
        self.links -= {link for link in self.links if worker in link}

    async def end_all(self) -> None:
        for worker in [*self.experts, *self.routes]:
            await self.end(worker)
        self.places.clear()

    def committed(self, desired: Desired) -> None:
        self.placement = desired.placement
        self.calls.append("committed")

    def check(self) -> None:
        """Every worker is just as the placement says."""
        assert {g: sorted(held) for g, held in self.experts.items()} == {
            g: self.placement.held_by(g) for g in self.experts
        }
        assert set(self.routes.values()) == {self.placement}
        assert self.links == {(s, g) for s in self.routes for g in self.experts} and not self.places


def reconfigurer(fleet: TableFleet, save=lambda: None) -> Reconfigurer:
    made = Reconfigurer(fleet, OperationLog(), lambda: None, save)
    made.desired = Desired(tuple(fleet.experts), tuple(fleet.routes), fleet.placement)
    made.planner.use_names([*fleet.experts, *fleet.routes])
    return made


async def idle(made: Reconfigurer) -> None:
    while len(made._background):
        await asyncio.sleep(0.005)
