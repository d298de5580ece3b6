"""A controller that was taken for dead goes on in mid-operation, after its successor has begun: whatever it does then
changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from table_fleet import TableFleet, idle

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.messages.operations import OperationLog, Phase, parse_operation

ORDERS = ("link", "load", "free", "adopt", "drain", "disconnect")


class World:
    """What controllers share: the workers, which obey the newest that they have heard of, and the store."""

    def __init__(self) -> None:
        self.table = TableFleet(["expert-0", "expert-1", "expert-2"], ["attention-0", "attention-1"])
        self.obeys: dict[str, int] = {}
        self.newest = 0
        self.saved = Desired(tuple(self.table.experts), tuple(self.table.routes), self.table.placement)


class View(TableFleet):
    """The fleet of one controller. `stop_at`: after so many moments between two of its calls it stands still until
    `go_on` is set."""

    def __init__(self, world: World, generation: int, stop_at: int | None = None):
        table = world.table
        super().__init__(table.experts, table.routes)
        self.world, self.generation, self.stop_at = world, generation, stop_at
        self.experts, self.routes, self.links, self.nodes = table.experts, table.routes, table.links, table.nodes
        self.placement = world.saved.placement
        self.moments = 0
        self.stopped, self.go_on = asyncio.Event(), asyncio.Event()

    def _call(self, *words: str) -> None:
        super()._call(*words)
        if words[0] in ORDERS:
            for worker in words[1:]:
                if self.world.obeys.get(worker, 0) > self.generation:
                    raise SupersededError(f"{worker} refuses")
                self.world.obeys[worker] = self.generation
        if words[0] in ("start", "end") and self.world.newest > self.generation:
            raise SupersededError("there is a newer one")

    async def _moment(self) -> None:
        self.moments += 1
        if self.moments == self.stop_at:
            self.stopped.set()
            await self.go_on.wait()
        await asyncio.sleep(0)

    async def load(self, group: str, pairs: list[Pair]) -> None:
        self._call("load", group)
        self.experts[group] |= set(pairs)


def _between_moments(method: Any) -> Any:
    async def call(self: View, *args: Any) -> None:
        await self._moment()
        await method(self, *args)
        await self._moment()

    return call


for _name in ("start_group", "start_shard", "link", "load", "free", "adopt", "leave_service", "disconnect", "end"):
    setattr(View, _name, _between_moments(getattr(View, _name)))


def controller(view: View) -> Reconfigurer:
    def save() -> None:
        if view.world.newest > view.generation:
            raise SupersededError("there is a newer one")
        view.world.saved = made.desired

    made = Reconfigurer(view, OperationLog(), lambda: None, save)
    made.desired = view.world.saved
    made.planner.use_names([*view.experts, *view.routes])
    return made


async def stopped_at(moment: int, target: dict[str, Any], at_once: bool) -> bool:
    """Play an operation that is stopped then, and goes on while its successor takes over, or (`at_once` false)
    afterwards; whether it was stopped."""
    world = World()
    old = View(world, 0, moment)
    made = controller(old)
    operation = made.submit(parse_operation(target))
    await asyncio.wait(
        [asyncio.ensure_future(idle(made)), asyncio.ensure_future(old.stopped.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    if not old.stopped.is_set():
        assert operation.phase is Phase.DONE
        return False
    world.newest = 1
    for worker in (*world.saved.groups, *world.saved.shards):  # as RayFleet.fence does, before the state is read
        world.obeys[worker] = 1
    new = View(world, 1)
    successor = controller(new)
    if at_once:
        old.go_on.set()
    successor.take_over()
    await idle(successor)
    old.go_on.set()
    await asyncio.wait_for(idle(made), 10)
    assert successor.desired == world.saved
    new.check()
    again = successor.submit(parse_operation({"expert_groups": 4, "attention_shards": 1}))
    await idle(successor)
    assert again.phase is Phase.DONE
    new.check()
    return True


TARGETS: dict[str, dict[str, Any]] = {
    "more": {"expert_groups": 4, "attention_shards": 3},
    "fewer": {"expert_groups": 2, "attention_shards": 1},
    "copies": {"copies": [{"layer": 1, "expert": 0, "count": 2}, {"layer": 2, "expert": 7, "count": 3}]},
}


@pytest.mark.parametrize("at_once", [True, False], ids=["meanwhile", "afterwards"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_whenever_it_was_stopped(target, at_once):
    moments = 0
    while asyncio.run(stopped_at(moments + 1, target, at_once)):
        moments += 1
    assert moments > 8
