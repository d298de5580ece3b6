"""The autoscaler's operations beside others: an operator's come first, and so does the replacement of the dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from table_fleet import TableFleet, idle, reconfigurer

from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.messages.operations import AUTOSCALER, Operation, OperationError, Phase, parse_operation
from isotherm.cluster.placement.table import Placement


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotherm.cluster.control.transactions.AT_ONCE_SECONDS", 0.01)


class FullFleet(TableFleet):
    """There is no room for expert-2 before `room` is set."""

    def __init__(self) -> None:
        super().__init__(["expert-0", "expert-1"], ["attention-0"])
        self.room = asyncio.Event()
        self.slow: asyncio.Event | None = None  # a commit waits for it

    async def adopt(self, shard: str, placement: Placement) -> None:
        if self.slow is not None:
            await self.slow.wait()
        await super().adopt(shard, placement)

    async def reserve(self, worker: str, avoid: frozenset[str]) -> None:
        if worker == "expert-2":
            await self.room.wait()
        await asyncio.sleep(0.005)
        await super().reserve(worker, avoid)


def play(act: Callable[[FullFleet, Reconfigurer], Awaitable[None]]) -> None:
    async def go() -> None:
        fleet = FullFleet()
        made = reconfigurer(fleet)
        await act(fleet, made)
        await idle(made)
        fleet.check()

    asyncio.run(asyncio.wait_for(go(), 20))


async def waits(made: Reconfigurer, origin: str, seconds: float = 900.0) -> Operation:
    operation = made.submit(parse_operation({"expert_groups": 3, "deadline_seconds": seconds}), origin)
    while not operation.waiting:
        await asyncio.sleep(0)
    assert operation.phase is Phase.PLANNED and operation.reasons == ["waiting for resources"]
    return operation


def test_an_operators_operation_takes_the_place_of_one_that_waits_for_room():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, AUTOSCALER)
        theirs = made.submit(parse_operation({"attention_shards": 2}))
        with pytest.raises(OperationError) as error:
            made.submit(parse_operation({"attention_shards": 3}))
        assert error.value.conflict
        await made.ended(theirs)
        assert theirs.phase is Phase.DONE and waiting.phase is Phase.ROLLED_BACK
        assert f"gives way: operation {theirs.id} was asked for" in waiting.reasons
        assert sorted(fleet.routes) == ["attention-0", "attention-1"]

    play(act)


def test_the_autoscaler_takes_its_turn():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        theirs = await waits(made, "api")
        with pytest.raises(OperationError) as error:
            made.submit(parse_operation({"expert_groups": 1}), AUTOSCALER)
        assert error.value.conflict
        fleet.room.set()
        await made.ended(theirs)
        assert theirs.phase is Phase.DONE

    play(act)


def test_a_dry_run_takes_nobodys_place():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, AUTOSCALER)
        assert made.submit(parse_operation({"attention_shards": 2, "dry_run": True})).phase is Phase.DONE
        fleet.room.set()
        await made.ended(waiting)
        assert waiting.phase is Phase.DONE

    play(act)


@pytest.mark.parametrize("origin", [AUTOSCALER, "api"])
def test_a_death_comes_before_what_waits_for_room(origin: str):
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, origin)
        fleet.dead.add("expert-1")
        made.heal()
        await made.ended(waiting)
        assert waiting.phase is Phase.ROLLED_BACK and "gives way: a worker was lost" in waiting.reasons
        await idle(made)
        assert "expert-1" not in fleet.experts and len(fleet.experts) == 2

    play(act)


COPIES = {"copies": [{"layer": 1, "expert": 0, "count": 2}]}


@pytest.mark.parametrize("origin", [AUTOSCALER, "api"])
def test_changes_of_copies_overtake_what_waits_for_room(origin: str):
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, origin)
        theirs = made.submit(parse_operation(COPIES))
        await made.ended(theirs)
        table = {1: ["expert-1"] * 8, 2: ["expert-0"] * 8}
        holders = tuple(tuple((g,) for g in groups) for groups in table.values())
        moved = made.rebalance(Placement(fleet.placement.version + 1, fleet.placement.layers, holders), "even")
        await made.ended(moved)
        assert (theirs.phase, moved.phase, waiting.phase, waiting.waiting) == (
            Phase.DONE,
            Phase.DONE,
            Phase.PLANNED,
            True,
        )
        fleet.room.set()
        await made.ended(waiting)
        assert waiting.phase is Phase.DONE and len(fleet.experts) == 3 and fleet.placement.version == 4
        assert set(fleet.placement.groups()) == set(fleet.experts)

    play(act)


def test_what_has_found_room_takes_its_turn():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, "api")
        fleet.slow = asyncio.Event()
        theirs = made.submit(parse_operation(COPIES))
        while theirs.phase is not Phase.COMMITTING:
            await asyncio.sleep(0)
        fleet.room.set()
        await asyncio.sleep(0.05)
        assert waiting.phase is Phase.PLANNED and not waiting.waiting and "expert-2" not in fleet.experts
        with pytest.raises(OperationError):  # it is its turn next
            made.submit(parse_operation(COPIES))
        fleet.slow.set()
        await made.ended(waiting)
        assert waiting.phase is theirs.phase is Phase.DONE and len(fleet.placement.holders[0][0]) == 2

    play(act)


def test_what_finds_no_room_in_time_changes_nothing_also_in_the_middle_of_another():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, AUTOSCALER, 0.1)
        fleet.slow = asyncio.Event()
        theirs = made.submit(parse_operation(COPIES))
        await made.ended(waiting)
        assert waiting.phase is Phase.ROLLED_BACK and "not within 0.1 s" in waiting.reasons[-1]
        assert theirs.phase is Phase.COMMITTING and fleet.calls.count("adopt attention-0") == 0
        fleet.slow.set()
        await made.ended(theirs)
        assert theirs.phase is Phase.DONE and fleet.calls.count("adopt attention-0") == 1

    play(act)


def test_only_one_changes_the_workers():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        waiting = await waits(made, "api")
        for target in ({"expert_groups": 1}, {"attention_shards": 2} | COPIES, {"drain_nodes": ["aa"]}):
            with pytest.raises(OperationError, match="waits for resources; until it ends only copies") as error:
                made.submit(parse_operation(target))
            assert error.value.conflict
        assert made.submit(parse_operation({"expert_groups": 1, "dry_run": True})).phase is Phase.DONE
        await made.interrupt("the cluster is being ended")
        await made.ended(waiting)
        assert waiting.reasons[1] == "gives way: the cluster is being ended" and waiting.phase is Phase.ROLLED_BACK

    play(act)


def test_what_is_asked_for_while_a_controller_takes_over_comes_after_that():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        fleet.room.set()
        await fleet.start_group("expert-2")  # what the controller before had begun
        made.planner.use_names(["expert-2"])
        made.take_over()
        await asyncio.sleep(0)
        operation = made.submit(parse_operation({"expert_groups": 4}))
        await made.ended(operation)
        assert operation.phase is Phase.DONE and sorted(fleet.experts) == [
            "expert-0",
            "expert-1",
            "expert-3",
            "expert-4",
        ], operation.reasons

    play(act)


def test_a_rebalance_that_was_planned_for_another_cluster_is_not_made():
    async def act(fleet: FullFleet, made: Reconfigurer) -> None:
        old = fleet.placement
        theirs = made.submit(parse_operation({"copies": [{"layer": 1, "expert": 0, "count": 2}]}))
        await made.ended(theirs)
        stale = made.rebalance(old, "")
        await made.ended(stale)
        assert stale.phase is Phase.ROLLED_BACK and "changed since" in " ".join(stale.reasons)
        assert fleet.placement.version == old.version + 1

    play(act)
