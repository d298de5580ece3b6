"""Transactions over a fleet that is only a table: what is undone, what is saved before what, and taking over from a
controller that has died."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from table_fleet import EXPERTS, LAYERS, TableFleet, idle, reconfigurer
from virtual_time import run_in_virtual_time

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import (
    Operation,
    OperationLog,
    Phase,
    PlacementChangeError,
    parse_operation,
)
from isotherm.cluster.placement.table import Placement, contiguous_placement


def run(made: Reconfigurer, **target: Any) -> Operation:
    async def work() -> Operation:
        operation = await made.ended(made.submit(parse_operation(target)))
        await idle(made)
        return operation

    return run_in_virtual_time(work())


def test_a_change_is_saved_when_it_is_adopted_and_before_anything_is_freed():
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    made = reconfigurer(fleet, lambda: fleet.calls.append(f"save version {made.desired.placement.version}"))
    operation = run(made, expert_groups=3, attention_shards=2)
    assert operation.phase is Phase.DONE and operation.committed
    assert made.desired == Desired(
        ("expert-0", "expert-1", "expert-2"), ("attention-0", "attention-1"), fleet.placement
    )
    at = {call: i for i, call in enumerate(fleet.calls)}
    assert (
        max(at["adopt attention-0"], at["adopt attention-1"])
        < at["save version 2"]
        < at["committed"]
        < at["free expert-0"]
    )
    fleet.check()


def test_what_cannot_be_saved_is_not_committed():
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])

    def save() -> None:
        raise ConnectionError("Ray's head is away")

    made = reconfigurer(fleet, save)
    before = fleet.placement, made.desired
    operation = run(made, expert_groups=3)
    assert (
        operation.phase is Phase.ROLLED_BACK
        and not operation.committed
        and "head is away" in " ".join(operation.reasons)
    )
    assert (fleet.placement, made.desired) == before
    fleet.check()


@pytest.mark.parametrize(
    "what", ["start expert-2", "link attention-0 expert-2", "load expert-2", "load expert-0", "adopt attention-1"]
)
def test_what_fails_before_the_commit_is_undone(what: str):
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    fleet.fails = {what}
    made = reconfigurer(fleet)
    target = (
        {"copies": [{"layer": 1, "expert": 7, "count": 2}]}
        if what == "load expert-0"
        else {"expert_groups": 3, "attention_shards": 2}
    )
    operation = run(made, **target)
    assert operation.phase is Phase.ROLLED_BACK and "does not work" in operation.reasons[0]
    assert fleet.placement.version == 1 and set(fleet.experts) == {"expert-0", "expert-1"}
    fleet.check()
    fleet.fails = set()
    assert run(made, expert_groups=3).phase is Phase.DONE
    assert "expert-2" not in fleet.experts or what == "load expert-0"  # a name is not used twice
    fleet.check()


def test_a_drained_node_is_left_and_not_used_until_it_is_drained_no_more():
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    fleet.nodes["expert-1"] = "bb"
    made = reconfigurer(fleet)
    assert run(made, drain_nodes=["aa"]).phase is Phase.DONE
    assert sorted(fleet.experts) == ["expert-1", "expert-2"] and list(fleet.routes) == ["attention-1"]
    assert made.desired.drained == fleet.avoid == {"aa"}
    assert run(made, expert_groups=3).phase is Phase.DONE
    assert {fleet.node_of(w) for w in [*fleet.experts, *fleet.routes]} == {"bb"}
    fleet.fails = {"link attention-1 expert-4"}
    assert run(made, expert_groups=4, drain_nodes=[]).phase is Phase.ROLLED_BACK
    assert made.desired.drained == fleet.avoid == {"aa"}
    assert run(made, drain_nodes=[], expert_groups=4).phase is Phase.DONE
    assert fleet.node_of("expert-5") == "aa" and not made.desired.drained
    fleet.check()


def test_a_number_of_copies_stays_an_operators_until_it_is_handed_back():
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    made = reconfigurer(fleet)
    copies = [{"layer": 1, "expert": e, "count": 2} for e in (0, 5)]
    assert run(made, copies=copies).phase is Phase.DONE
    assert made.pinned() == {(1, 0), (1, 5)}
    assert run(made, expert_groups=3).phase is Phase.DONE
    fleet.dead = {"expert-0"}
    run_in_virtual_time(healed(made))
    assert made.pinned() == {(1, 0), (1, 5)} and not fleet.dead
    version = fleet.placement.version
    fleet.fails = {"adopt attention-0"}
    back = {"copies": [{"layer": 1, "expert": 0, "count": None}, {"layer": 2, "expert": 1, "count": None}]}
    run(made, **back)
    assert made.pinned() == {(1, 0), (1, 5)}  # it was not committed
    fleet.fails = set()
    assert made.submit(parse_operation(back | {"dry_run": True})).plan == [
        "leave the copies of 1 experts to the autoscaler"
    ]
    assert run(made, **back).phase is Phase.DONE
    assert made.pinned() == {(1, 5)} and fleet.placement.version == version
    fleet.check()


def test_a_change_that_cannot_be_is_no_operation_that_failed():
    """Three typing errors raised the alert for operations that are rolled back."""

    async def go() -> None:
        made = reconfigurer(TableFleet(["expert-0", "expert-1"], ["attention-0"]))
        with pytest.raises(PlacementChangeError):
            made.submit(parse_operation({"copies": [{"layer": 99, "expert": 0, "count": 1}]}))
        assert made._operations.all() == [] and made._operations.ended() == {}

    asyncio.run(go())


async def healed(made: Reconfigurer) -> None:
    made.heal()
    await idle(made)


def test_a_rebalance_leaves_what_an_operator_has_set_meanwhile():
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    made = reconfigurer(fleet)

    async def work() -> None:
        await made.ended(made.submit(parse_operation({"copies": [{"layer": 1, "expert": 0, "count": 2}]})))
        await idle(made)
        placement = contiguous_placement(LAYERS, EXPERTS, ["expert-1", "expert-0"], version=fleet.placement.version + 1)
        moving = made.rebalance(placement, "")
        made.submit(parse_operation({"copies": [{"layer": 1, "expert": 0, "count": None}]}))
        await idle(made)
        assert moving.phase is Phase.DONE or "gives way" in moving.reasons[-1]

    run_in_virtual_time(work())
    assert made.pinned() == set()
    fleet.check()


def taken_over(fleet: TableFleet, desired: Desired) -> Reconfigurer:
    async def work() -> Reconfigurer:
        made = Reconfigurer(fleet, OperationLog(), lambda: None, lambda: None)
        made.planner.use_names([*fleet.experts, *fleet.routes])
        made.desired = desired
        made.take_over()
        await idle(made)
        return made

    return run_in_virtual_time(work())


def test_taking_over_ends_what_was_half_prepared():
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    desired = Desired(tuple(fleet.experts), tuple(fleet.routes), fleet.placement)

    async def half() -> None:
        await fleet.start_group("expert-2")
        await fleet.start_shard("attention-1")
        await fleet.link("attention-0", "expert-2")
        await fleet.load("expert-2", [(1, 7)])
        await fleet.load("expert-0", [(2, 7)])

    run_in_virtual_time(half())
    assert taken_over(fleet, desired).desired == desired
    assert set(fleet.experts) == {"expert-0", "expert-1"} and set(fleet.routes) == {"attention-0"}
    fleet.check()


def test_taking_over_in_mid_commit_goes_back_and_in_mid_freeing_goes_on():
    for committed in (False, True):
        fleet = TableFleet(["expert-0", "expert-1"], ["attention-0", "attention-1"])
        old, new = fleet.placement, contiguous_placement(LAYERS, EXPERTS, ["expert-1", "expert-0"], version=2)

        async def half(fleet: TableFleet = fleet, new: Placement = new, committed: bool = committed) -> None:
            for group in ("expert-0", "expert-1"):
                await fleet.load(group, new.held_by(group))
            for shard in fleet.shard_names()[: 2 if committed else 1]:
                await fleet.adopt(shard, new)

        run_in_virtual_time(half())
        fleet.placement = new if committed else old
        taken_over(fleet, Desired(tuple(fleet.experts), tuple(fleet.routes), fleet.placement))
        fleet.check()


@pytest.mark.parametrize("victim", ["expert-1", "attention-0", "expert-2", "attention-2"])
def test_taking_over_where_one_has_died_replaces_it_unless_it_was_half_prepared(victim: str):
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0", "attention-1"])
    desired = Desired(tuple(fleet.experts), tuple(fleet.routes), fleet.placement)

    async def half() -> None:
        await fleet.start_group("expert-2")
        await fleet.start_shard("attention-2")

    run_in_virtual_time(half())
    fleet.dead = {victim}
    made = taken_over(fleet, desired)
    assert not fleet.dead and len(fleet.experts) == len(fleet.routes) == 2
    assert made.desired.groups == tuple(fleet.experts) and made.desired.shards == tuple(fleet.routes)
    fleet.check()


async def until(so: Callable[[], bool]) -> None:
    """Within some minutes of virtual time."""

    async def look() -> None:
        while not so():
            await asyncio.sleep(0.1)

    await asyncio.wait_for(look(), 300)


@pytest.mark.parametrize("linked", [True, False])
def test_a_stray_that_cannot_be_ended_keeps_nobody_dead(linked: bool):
    """Ray's head was away when the controller came back, and who was dead then stayed so until another died."""
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    made = reconfigurer(fleet)

    async def work() -> None:
        await fleet.start_group("expert-2")  # what the controller before had begun
        if linked:
            await fleet.link("attention-0", "expert-2")
        made.planner.use_names(["expert-2"])
        fleet.dead, fleet.fails = {"expert-1"}, {"end expert-2"}
        made.take_over()
        await until(lambda: not fleet.dead and not made._healing)
        assert made.desired.groups == ("expert-0", "expert-3") and "expert-2" in fleet.experts
        fleet.fails.clear()
        await idle(made)

    run_in_virtual_time(work())
    assert sorted(fleet.experts) == ["expert-0", "expert-3"]
    fleet.check()


def test_a_group_that_does_not_say_what_it_holds_keeps_nothing_else_from_being_taken_over(monkeypatch):
    """While it loads something it does not; all the rest waited for that, and was left undone after a minute."""
    fleet = TableFleet(["expert-0", "expert-1", "expert-2"], ["attention-0", "attention-1"])
    made = reconfigurer(fleet)
    loads, real = asyncio.Event(), fleet.held

    async def held(group: str) -> list[Pair]:
        if group == "expert-0":
            await loads.wait()
        return await real(group)

    async def work() -> None:
        for group in fleet.experts:
            await fleet.load(group, [(1, 0), (2, 7)])
        await fleet.start_shard("attention-2")
        made.planner.use_names(["attention-2"])
        monkeypatch.setattr(fleet, "held", held)
        fleet.dead = {"expert-2"}
        made.take_over()
        clock = asyncio.get_running_loop().time
        await until(lambda: not fleet.dead and not made._healing)
        assert clock() < 20
        assert fleet.calls.index("drain attention-2") < fleet.calls.index("end attention-2")
        assert "free expert-1" in fleet.calls and "free expert-0" not in fleet.calls
        loads.set()
        await idle(made)

    run_in_virtual_time(work())
    fleet.check()


def test_what_dies_while_another_is_replaced_is_replaced_too():
    fleet = TableFleet(["expert-0", "expert-1", "expert-2"], ["attention-0"])
    made = reconfigurer(fleet)

    async def work() -> None:
        fleet.dead = {"attention-0"}
        made.heal()
        await asyncio.sleep(0)
        fleet.dead.add("expert-1")  # after the plan was made
        await idle(made)

    run_in_virtual_time(work())
    assert len(fleet.experts) == 3 and len(fleet.routes) == 1 and not fleet.dead
    fleet.check()


def test_where_there_is_no_room_the_others_take_over_until_there_is(monkeypatch):
    monkeypatch.setattr("isotherm.cluster.control.reconfigurer.RECOVERY_SECONDS", 0.05)
    fleet = TableFleet(["expert-0", "expert-1", "expert-2"], ["attention-0"])
    made = reconfigurer(fleet)
    seen = []

    async def work() -> None:
        fleet.dead, fleet.full = {"expert-1"}, True
        made.heal()
        while len(fleet.experts) > 2:
            await asyncio.sleep(0.01)
        seen.append(set(fleet.experts))
        fleet.check()
        fleet.full = False
        await idle(made)

    run_in_virtual_time(work())
    assert seen == [{"expert-0", "expert-2"}] and len(fleet.experts) == 3 and "expert-1" not in fleet.experts
    fleet.check()


def test_healing_goes_on_for_as_long_as_it_takes(monkeypatch):
    """It gave up after twenty attempts, while the status said that the worker was being replaced."""
    from isotherm.cluster.control import reconfigurer as reconfigure

    monkeypatch.setattr(reconfigure, "HEAL_PAUSE", 0.0005)
    monkeypatch.setattr(reconfigure, "LONGEST_HEAL_PAUSE", 0.001)
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    made = reconfigurer(fleet)

    async def work() -> None:
        fleet.dead.add("expert-1")
        attempts = 0
        real = fleet.start_group

        async def start_group(name: str) -> None:
            nonlocal attempts
            attempts += 1
            if attempts <= 40:
                raise RuntimeError("no node can be reached")
            await real(name)

        fleet.start_group = start_group  # type: ignore[method-assign]
        made.heal()
        await idle(made)
        assert attempts == 41

    run_in_virtual_time(work())
    fleet.check()
    assert "expert-1" not in fleet.experts and len(fleet.experts) == 2


def test_healing_begins_anew_where_it_fails_itself(monkeypatch):
    from isotherm.cluster import background

    monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)
    fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
    made = reconfigurer(fleet)
    failures = []

    async def work() -> None:
        fleet.dead.add("expert-1")
        alive = fleet.alive

        def broken(workers: Iterable[str]) -> list[str]:
            if len(failures) < 3:
                failures.append(True)
                raise ConnectionError("Ray's head is away")
            return alive(workers)

        fleet.alive = broken  # type: ignore[method-assign]
        made.heal()
        await idle(made)

    run_in_virtual_time(work())
    fleet.check()
    assert len(failures) == 3
