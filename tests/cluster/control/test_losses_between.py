"""A worker is lost while others leave or are about to come: it is replaced at once, and there are as many workers
afterwards as were committed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from table_fleet import TableFleet, idle, reconfigurer
from virtual_time import run_in_virtual_time

from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import Operation, Phase, parse_operation

LONG = 1000.0  # seconds


class SlowFleet(TableFleet):
    """Shards drain for as long as they may, and new groups load for ever until `loads` is set."""

    def __init__(self, shards: int) -> None:
        super().__init__(["expert-0", "expert-1"], [f"attention-{i}" for i in range(shards)])
        self.loads = asyncio.Event()

    async def leave_service(self, shard: str, seconds: float) -> None:
        await super().leave_service(shard, seconds)
        await asyncio.sleep(seconds)

    async def load(self, group: str, pairs: list[Pair]) -> None:
        if group == "expert-2":
            await self.loads.wait()
        await super().load(group, pairs)


def play(shards: int, act: Callable[[SlowFleet, Reconfigurer], Awaitable[None]]) -> SlowFleet:
    async def go() -> SlowFleet:
        fleet = SlowFleet(shards)
        made = reconfigurer(fleet)
        await act(fleet, made)
        fleet.loads.set()
        await asyncio.wait_for(idle(made), LONG)
        fleet.check()
        assert (sorted(made.desired.groups), sorted(made.desired.shards)) == (
            sorted(fleet.experts),
            sorted(fleet.routes),
        )
        return fleet

    return run_in_virtual_time(go())


async def called(fleet: SlowFleet, call: str) -> None:
    while call not in fleet.calls:
        await asyncio.sleep(0.01)


async def draining(fleet: SlowFleet, made: Reconfigurer) -> Operation:
    """Three shards are to be two, and the third one is being drained."""
    operation = made.submit(parse_operation({"attention_shards": 2}))
    await called(fleet, "drain attention-2")
    return operation


def test_a_group_is_replaced_at_once_while_a_shard_is_drained_and_the_shard_stays_away():
    """The shard may wait for what the group held; and it was taken for one of those that there are to be."""

    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        fleet.loads.set()
        operation = await draining(fleet, made)
        fleet.dead.add("expert-1")
        made.heal()
        begin = asyncio.get_running_loop().time()
        while fleet.dead:
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - begin < 3.0
        assert operation.phase is Phase.DONE and "attention-2" not in fleet.routes

    fleet = play(3, act)
    assert (sorted(fleet.experts), sorted(fleet.routes)) == (["expert-0", "expert-2"], ["attention-0", "attention-1"])


def test_a_shard_that_nobody_disturbs_is_drained_for_as_long_as_it_may():
    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        begin = asyncio.get_running_loop().time()
        await made.ended(await draining(fleet, made))
        assert asyncio.get_running_loop().time() - begin >= 20.0

    assert sorted(play(3, act).routes) == ["attention-0", "attention-1"]


def test_a_shard_that_dies_while_it_is_drained_is_not_replaced():
    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        await draining(fleet, made)
        fleet.dead.add("attention-2")
        made.heal()

    fleet = play(3, act)
    assert sorted(fleet.routes) == ["attention-0", "attention-1"] and not fleet.dead
    assert not any(call.startswith("start") for call in fleet.calls)


def test_a_shard_that_drains_no_longer_gives_back_what_it_has():
    """So that its requests are moved, and not suspect of having brought it down."""

    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        await draining(fleet, made)
        fleet.dead.add("expert-1")
        made.heal()

    calls = play(3, act).calls
    assert calls.count("drain attention-2") == 2 and calls.index("end attention-2") > calls.index("drain attention-2")


def test_another_one_that_is_lost_while_a_recovery_waits_to_be_tried_again_is_replaced_soon():
    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        fleet.loads.set()
        fleet.fails = {"adopt attention-0"}
        fleet.dead.add("expert-1")
        made.heal()
        await asyncio.sleep(100)  # it is tried every half minute now
        fleet.fails.clear()
        fleet.dead.add("attention-0")
        made.heal()
        begin = asyncio.get_running_loop().time()
        await called(fleet, "start attention-2")
        assert asyncio.get_running_loop().time() - begin < 5

    play(2, act)


def test_a_scale_up_that_gave_way_to_a_loss_is_not_carried_out_all_the_same():
    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        operation = made.submit(parse_operation({"expert_groups": 3}))
        await called(fleet, "start expert-2")
        fleet.dead.add("attention-1")
        made.heal()
        assert (await made.ended(operation)).phase is Phase.ROLLED_BACK

    fleet = play(2, act)
    assert (sorted(fleet.experts), sorted(fleet.routes)) == (["expert-0", "expert-1"], ["attention-0", "attention-2"])


def test_what_a_controller_before_has_half_prepared_does_not_count_where_one_is_lost_meanwhile():
    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        await fleet.start_group("expert-2")
        await fleet.start_shard("attention-2")
        made.planner.use_names(["expert-2", "attention-2"])
        made.take_over()
        await called(fleet, "drain attention-2")
        fleet.dead.add("expert-1")
        made.heal()

    fleet = play(2, act)
    assert (sorted(fleet.experts), sorted(fleet.routes)) == (["expert-0", "expert-3"], ["attention-0", "attention-1"])


def test_what_an_operator_asks_for_between_a_recovery_without_room_and_its_end_holds(monkeypatch):
    monkeypatch.setattr("isotherm.cluster.control.reconfigurer.RECOVERY_SECONDS", 1.0)

    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        fleet.loads.set()
        fleet.dead.add("expert-1")
        fleet.full = True
        made.heal()
        while len(fleet.experts) > 1 or made._operations.running() is not None:
            await asyncio.sleep(0.01)
        fleet.full = False
        assert made._healing
        operation = made.submit(parse_operation({"attention_shards": 1}))
        await made.ended(operation)
        assert operation.phase is Phase.DONE, operation.reasons

    fleet = play(2, act)
    assert (len(fleet.experts), len(fleet.routes)) == (1, 1)


@pytest.mark.parametrize("origin", ["api", "autoscaler"])
def test_an_operation_that_waits_for_its_turn_leaves_it_to_the_recovery(origin: str):
    async def act(fleet: SlowFleet, made: Reconfigurer) -> None:
        async with made.transactions.turn:
            operation = made.submit(parse_operation({"expert_groups": 3}), origin)
            await asyncio.sleep(0.1)
            fleet.dead.add("attention-1")
            made.heal()
        assert (await made.ended(operation)).phase is Phase.ROLLED_BACK
        assert "gives way: a worker was lost" in operation.reasons[0]

    fleet = play(2, act)
    assert (len(fleet.experts), sorted(fleet.routes)) == (2, ["attention-0", "attention-2"])
