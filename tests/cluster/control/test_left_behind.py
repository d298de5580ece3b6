"""What an operation leaves behind where it can be neither carried out nor undone as it should be: it stands in nobody's
way, and is cleared away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from table_fleet import TableFleet, idle, reconfigurer
from virtual_time import run_in_virtual_time

from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.operations import Operation, Phase, parse_operation
from isotherm.cluster.placement.table import Placement

GROUPS, SHARDS = ["expert-0", "expert-1"], ["attention-0", "attention-1"]
COPIES = {"copies": [{"layer": 1, "expert": 7, "count": 2}]}


async def soon_idle(made: Reconfigurer) -> None:
    await asyncio.wait_for(idle(made), 600)


def run(made: Reconfigurer, **target: Any) -> Operation:
    async def work() -> Operation:
        operation = await asyncio.wait_for(made.ended(made.submit(parse_operation(target))), 600)
        await soon_idle(made)
        return operation

    return run_in_virtual_time(work())


def heal(made: Reconfigurer) -> None:
    async def work() -> None:
        made.heal()
        await soon_idle(made)

    run_in_virtual_time(work())


def test_a_roll_back_goes_on_past_a_shard_that_does_not_take_the_old_placement():
    """It gave up, and what it had started counted as a member to which no placement could be committed."""
    fleet = TableFleet(GROUPS, SHARDS)
    made = reconfigurer(fleet)
    fleet.fails = {"link attention-2 expert-0", "adopt attention-1"}
    operation = run(made, attention_shards=3)
    assert operation.phase is Phase.FAILED and "adopt" in operation.reasons[-1]
    assert sorted(fleet.routes) == SHARDS
    fleet.fails, fleet.dead = set(), {"attention-1"}
    heal(made)
    assert sorted(fleet.routes) == ["attention-0", "attention-3"]
    fleet.check()


def test_a_shard_that_dies_in_the_roll_back_is_no_failure_of_it():
    fleet = TableFleet(GROUPS, SHARDS)
    made = reconfigurer(fleet)
    adopt = fleet.adopt

    async def dies(shard: str, placement: Placement) -> None:
        if shard == "attention-1":
            fleet.dead.add(shard)
            raise ConnectionError("the actor died")
        await adopt(shard, placement)

    fleet.adopt, fleet.fails = dies, {"link attention-2 expert-0"}  # type: ignore[method-assign]
    assert run(made, attention_shards=3).phase is Phase.ROLLED_BACK
    fleet.adopt, fleet.fails = adopt, set()  # type: ignore[method-assign]
    heal(made)
    assert sorted(fleet.routes) == ["attention-0", "attention-3"]
    fleet.check()


@pytest.mark.parametrize("what", ["attention-2", "expert-2"])
def test_what_could_not_be_ended_is_no_member_and_is_ended_by_the_next_operation(what: str):
    fleet = TableFleet(GROUPS, SHARDS)
    made = reconfigurer(fleet)
    fleet.fails = {f"end {what}", "link attention-2 expert-0"}
    assert run(made, expert_groups=3, attention_shards=3).phase is Phase.FAILED
    assert what in fleet.group_names() + fleet.shard_names()
    fleet.fails, fleet.dead = set(), {"expert-1"}
    heal(made)
    assert (len(fleet.experts), sorted(fleet.routes)) == (2, SHARDS)
    assert what not in fleet.group_names() + fleet.shard_names()
    fleet.check()


def test_experts_that_could_not_be_freed_are_freed_after_the_next_commit():
    fleet = TableFleet(GROUPS, ["attention-0"])
    made = reconfigurer(fleet)
    fleet.fails = {"load expert-0", "adopt attention-0"}
    assert run(made, **COPIES).phase is Phase.FAILED
    with pytest.raises(AssertionError):
        fleet.check()
    fleet.fails = {"load expert-0", "free expert-0"}
    operation = run(made, **COPIES)
    assert operation.phase is Phase.ROLLED_BACK and "not everything was freed" in operation.reasons[-1]
    fleet.fails = set()
    assert run(made, attention_shards=2).phase is Phase.DONE
    fleet.check()
    assert run(made, **COPIES).phase is Phase.DONE
    fleet.check()


def test_a_group_that_leaves_is_ended_though_its_links_could_not_be_closed_nor_experts_freed():
    fleet = TableFleet(["expert-0", "expert-1", "expert-2"], SHARDS)
    made = reconfigurer(fleet)
    assert run(made, copies=[{"layer": 1, "expert": 0, "count": 3}]).phase is Phase.DONE
    fleet.fails = {"disconnect attention-0 expert-2", "drain attention-1"}
    operation = run(made, expert_groups=2, attention_shards=1)
    assert operation.phase is Phase.DONE and "drain" in operation.reasons[-1]
    assert (sorted(fleet.experts), sorted(fleet.routes)) == (GROUPS, ["attention-0"])
    fleet.fails = set()
    heal(made)
    assert (sorted(fleet.experts), sorted(fleet.routes)) == (GROUPS, ["attention-0"])
    fleet.check()


class HangingFleet(TableFleet):
    """Each call in `hangs` does not return once."""

    def __init__(self) -> None:
        super().__init__(GROUPS, SHARDS)
        self.hangs: set[str] = set()

    async def _hang(self, *words: str) -> None:
        if (call := " ".join(words)) in self.hangs:
            self.hangs.discard(call)
            await asyncio.Event().wait()

    async def free(self, group: str, pairs: list[Pair]) -> None:
        await self._hang("free", group)
        await super().free(group, pairs)

    async def disconnect(self, shard: str, group: str) -> None:
        await self._hang("disconnect", shard, group)
        await super().disconnect(shard, group)

    async def adopt(self, shard: str, placement: Placement) -> None:
        await self._hang("adopt", shard)
        await super().adopt(shard, placement)


@pytest.mark.parametrize("what", ["free expert-0", "disconnect attention-0 expert-2"])
def test_no_step_of_a_roll_back_keeps_the_others_waiting(what: str):
    fleet = HangingFleet()
    made = reconfigurer(fleet)
    fleet.hangs, fleet.fails = {what}, {"load expert-2", "load expert-0"}

    async def work() -> None:
        target = COPIES if "free" in what else {"expert_groups": 3}
        operation = await asyncio.wait_for(made.ended(made.submit(parse_operation(target))), 30)
        assert operation.phase is Phase.ROLLED_BACK
        assert not fleet.hangs
        fleet.fails = set()
        await made.ended(made.submit(parse_operation({"expert_groups": 3})))
        await soon_idle(made)

    run_in_virtual_time(work())
    fleet.check()


def test_a_commit_that_takes_too_long_is_not_a_replacement_without_a_place():
    fleet = HangingFleet()
    made = reconfigurer(fleet)
    fleet.dead, fleet.hangs = {"expert-1"}, {"adopt attention-0"}
    heal(made)
    assert fleet.calls.count("committed") == 1 and len(fleet.experts) == 2
    assert made._operations.all()[0].reasons == ["OperationError: it was prepared, but not taken up within 60 s"]
    fleet.check()


@pytest.mark.parametrize("what", ["adopt attention-0", "free expert-0"])
def test_nothing_is_under_way_any_more_where_every_worker_is_being_ended(what: str):
    """A revision that was rolled away ended in its recovery, and that kept every other operation away for ever."""
    fleet = HangingFleet()
    made = reconfigurer(fleet)
    fleet.dead, fleet.hangs = {"attention-1"}, {what}
    fleet.fails = {"load expert-0"} if "free" in what else set()

    async def work() -> None:
        if "free" in what:
            operation = made.submit(parse_operation(COPIES))
        else:
            made.heal()
            await asyncio.sleep(0.1)
            (operation,) = made._operations.all()
        await asyncio.sleep(0.1)
        assert not operation.phase.is_final
        await made.interrupt("the cluster is being ended")
        assert operation.phase is Phase.ROLLED_BACK and made._operations.running() is None

    run_in_virtual_time(work())
