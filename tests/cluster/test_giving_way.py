"""The autoscaler's operations beside others: an operator's come first, and so does the replacement of the dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from isotherm.cluster.operations import AUTOSCALER, Operation, OperationError, Phase, parse_operation
from isotherm.cluster.reconfigure import Reconfigurer
from tests.cluster.test_reconfigure import TableFleet, ended, idle, reconfigurer


class FullFleet(TableFleet):
    """There is no room for expert-2 before `room` is set."""

    def __init__(self) -> None:
        super().__init__(["expert-0", "expert-1"], ["attention-0"])
        self.room = asyncio.Event()

    async def start_group(self, name: str) -> None:
        if name == "expert-2":
            await self.room.wait()
        await super().start_group(name)


def play(act: Callable[[FullFleet, Reconfigurer], Awaitable[None]]) -> None:
    async def go() -> None:
        fleet = FullFleet()
        made = reconfigurer(fleet)
        await act(fleet, made)
        await idle(made)
        fleet.check()

    asyncio.run(asyncio.wait_for(go(), 20))


async def preparing(made: Reconfigurer, origin: str) -> Operation:
    operation = made.submit(parse_operation({"expert_groups": 3, "deadline_seconds": 900.0}), origin)
    while operation.phase is not Phase.PREPARING:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    return operation


def test_an_operators_operation_takes_the_place_of_one_that_waits_for_room():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await preparing(made, AUTOSCALER)
        theirs = made.submit(parse_operation({"attention_shards": 2}))
        with pytest.raises(OperationError) as error:
            made.submit(parse_operation({"attention_shards": 3}))
        assert error.value.conflict
        await ended(theirs)
        assert theirs.phase is Phase.DONE and waiting.phase is Phase.ROLLED_BACK
        assert f"gives way: operation {theirs.id} was asked for" in waiting.reasons
        assert sorted(fleet.routes) == ["attention-0", "attention-1"]

    play(act)


def test_the_autoscaler_takes_its_turn():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        theirs = await preparing(made, "api")
        with pytest.raises(OperationError) as error:
            made.submit(parse_operation({"expert_groups": 1}), AUTOSCALER)
        assert error.value.conflict
        fleet.room.set()
        await ended(theirs)
        assert theirs.phase is Phase.DONE

    play(act)


def test_a_dry_run_takes_nobodys_place():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await preparing(made, AUTOSCALER)
        assert made.submit(parse_operation({"attention_shards": 2, "dry_run": True})).phase is Phase.DONE
        fleet.room.set()
        await ended(waiting)
        assert waiting.phase is Phase.DONE

    play(act)


@pytest.mark.parametrize("origin", [AUTOSCALER, "api"])
def test_a_death_comes_before_what_waits_for_room(origin: str):
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await preparing(made, origin)
        fleet.dead.add("expert-1")
        made.heal()
        await ended(waiting)
        assert waiting.phase is Phase.ROLLED_BACK and "gives way: a worker was lost" in waiting.reasons
        await idle(made)
        assert "expert-1" not in fleet.experts and len(fleet.experts) == 2

    play(act)


def test_a_rebalance_that_was_planned_for_another_cluster_is_not_made():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        old = fleet.placement
        theirs = made.submit(parse_operation({"copies": [{"layer": 1, "expert": 0, "count": 2}]}))
        await ended(theirs)
        stale = made.rebalance(old, "")
        await ended(stale)
        assert stale.phase is Phase.ROLLED_BACK and "changed since" in " ".join(stale.reasons)
        assert fleet.placement.version == old.version + 1

    play(act)
