"""Another model takes over as a transaction: what is undone, what is done in which order, and when the one before may
end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from table_fleet import EXPERTS, LAYERS, TableFleet, idle, reconfigurer
from virtual_time import run_in_virtual_time

from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.control.roll import NOWHERE_SECONDS, QUIET_SECONDS, Quiet, roll
from isotherm.cluster.messages.operations import Operation, OperationError, OperationLog, Phase, Target, parse_operation
from isotherm.cluster.placement.table import contiguous_placement
from isotherm.cluster.routing.shard_client import RECONNECT, RESUBMIT_SECONDS

PATIENCE = inspect.signature(ExpertExchange).parameters["patience"].default


class Successor:
    """Writes down what is asked of it; `fails` and `hangs` name calls that do."""

    def __init__(self, fails: str = "", hangs: str = ""):
        self.fails, self.hangs = fails, hangs
        self.waits: Mapping[str, str] = {}
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError(f"{name} does not work")

    async def start(self) -> None:
        self._call("start")
        if self.hangs == "start":
            self.waits = {"expert-9": "expert-9 waits for a node"}
            await asyncio.Event().wait()

    async def announce(self) -> None:
        self._call("announce")

    def take_over(self) -> None:
        self._call("take over")

    async def end(self) -> None:
        self._call("end")


def opened(made: Reconfigurer, **more: Any) -> Operation:
    operation, _ = made.open(parse_operation({"model": "/m", **more}))
    return operation


def rolled(successor: Successor, seconds: float = 5.0) -> Operation:
    async def work() -> Operation:
        made = reconfigurer(TableFleet(["expert-0"], ["attention-0"]))
        operation = opened(made)
        operation.plan = ["start expert-9"]
        committed = await roll(made.transactions, operation, successor, seconds)
        assert committed == operation.committed
        return operation

    return run_in_virtual_time(work())


def test_it_is_announced_before_it_takes_over():
    successor = Successor()
    operation = rolled(successor)
    assert successor.calls == ["start", "announce", "take over"]
    assert operation.finishes and operation.phase is Phase.COMMITTING  # the streams of the one before go on


@pytest.mark.parametrize("what", ["start", "announce", "take over"])
def test_what_fails_before_it_takes_over_is_undone(what: str):
    successor = Successor(fails=what)
    operation = rolled(successor)
    assert successor.calls[-2:] == [what, "end"]
    assert operation.phase is Phase.ROLLED_BACK and "does not work" in operation.reasons[0]


def test_what_cannot_be_undone_is_said():
    successor = Successor(hangs="start", fails="end")
    operation = rolled(successor, 0.05)
    assert operation.phase is Phase.FAILED and "end does not work" in operation.reasons[-1]


def test_without_room_in_time_it_says_what_it_waited_for():
    successor = Successor(hangs="start")
    successor.waits = {"expert-9": "expert-9 waits for a node"}
    operation = rolled(successor, 0.05)
    assert operation.phase is Phase.ROLLED_BACK and successor.calls == ["start", "end"]
    assert operation.reasons == ["not within 0.05 s, its deadline: expert-9 waits for a node"]


def test_a_loss_among_the_workers_that_serve_comes_first():
    async def work() -> None:
        fleet = TableFleet(["expert-0", "expert-1"], ["attention-0"])
        made = reconfigurer(fleet)
        successor, operation = Successor(hangs="start"), opened(made)
        rolling = asyncio.ensure_future(roll(made.transactions, operation, successor, 5.0))
        await asyncio.sleep(0.02)
        fleet.dead = {"expert-0"}
        made.heal()
        assert not await rolling
        assert operation.phase is Phase.ROLLED_BACK and "a worker was lost" in operation.reasons[0]
        await idle(made)
        assert sorted(fleet.experts) == ["expert-1", "expert-2"]
        fleet.check()

    run_in_virtual_time(work())


def test_a_twin_has_every_copy_in_the_place_of_one():
    fleet = TableFleet(["expert-3", "expert-5"], ["attention-1"])
    made = reconfigurer(fleet)
    copied = contiguous_placement(LAYERS, EXPERTS, ["expert-3", "expert-5"], version=7)
    holders = ((("expert-3", "expert-5"), *copied.holders[0][1:]), copied.holders[1])
    now = Desired(
        ("expert-3", "expert-5"),
        ("attention-1",),
        type(copied)(7, copied.layers, holders),
        frozenset({"aa"}),
        frozenset({(1, 0)}),
    )
    twin = made.planner.twin(now, Target())
    assert (twin.groups, twin.shards) == (("expert-6", "expert-7"), ("attention-2",))
    assert twin.placement.version == 8 and twin.placement.holders[0][0] == ("expert-6", "expert-7")
    assert len(twin.placement.held_by("expert-6")) == len(now.placement.held_by("expert-3"))
    assert (twin.drained, twin.pinned) == (now.drained, now.pinned)
    assert made.planner.twin(now, Target()) == twin  # a dry run takes no names


def test_a_twin_may_be_smaller():
    made = reconfigurer(TableFleet(["expert-3", "expert-5"], ["attention-1", "attention-2"]))
    now = replace(made.desired, pinned=frozenset({(1, 0)}))
    twin = made.planner.twin(now, Target(model="/m", expert_groups=1, attention_shards=1))
    assert (twin.groups, twin.shards) == (("expert-6",), ("attention-3",)) and not twin.pinned
    assert twin.placement == contiguous_placement(LAYERS, EXPERTS, ["expert-6"], version=2)


def test_the_one_before_ends_when_it_has_been_quiet_for_long_enough():
    quiet = Quiet(10.0)
    looks = [(3, 0.0), (0, 1.0), (0, 10.9), (None, 10.95), (0, 11.0), (1, 20.9), (0, 21.0), (0, 30.9), (0, 31.0)]
    assert [quiet.look(count, now) for count, now in looks] == [False] * 8 + [True]


def test_one_without_a_shard_ends_when_its_streams_have_been_given_up():
    """Where there was no room for another shard it never ended."""
    assert max(RESUBMIT_SECONDS + RECONNECT[1], PATIENCE) + QUIET_SECONDS < NOWHERE_SECONDS
    quiet = Quiet(10.0, 150.0)
    looks = [
        (0, 0.0, True),
        (None, 5.0, False),
        (None, 100.0, True),  # it has had one meanwhile
        (None, 101.0, False),
        (None, 250.0, False),
        (2, 250.5, False),
        (None, 251.0, False),
        (None, 400.5, False),
        (None, 401.0, False),
    ]
    assert [quiet.look(*look) for look in looks] == [False] * 8 + [True]


def committed(log: OperationLog) -> Operation:
    operation, _ = log.open(parse_operation({"model": "/m", "idempotency_key": "k"}), 1.0)
    operation.enter(Phase.COMMITTING, 2.0)
    operation.committed = True
    return operation


def test_while_streams_finish_other_operations_go_on_but_for_another_model():
    log = OperationLog()
    operation = committed(log)
    assert log.running() is None and log.finishing() is operation is log.under_way()
    scale, _ = log.open(parse_operation({"expert_groups": 3}), 3.0)
    assert log.running() is scale
    scale.enter(Phase.DONE, 4.0)
    for target in ({"model": "/n"}, {"manifest": {}}, {"drain_nodes": ["aa"]}):
        with pytest.raises(OperationError, match="streams finish") as error:
            log.open(parse_operation(target), 5.0)
        assert error.value.conflict
    assert log.known(parse_operation({"model": "/m", "idempotency_key": "k"})) is operation


def test_a_controller_that_comes_back_goes_on_with_it():
    log = OperationLog()
    operation = committed(log)
    again = OperationLog.load(log.dump(), 9.0)
    assert again.finishing() is not None and again.finishing().id == operation.id
    fresh = OperationLog()
    fresh.open(parse_operation({"model": "/m"}), 1.0)
    assert OperationLog.load(fresh.dump(), 9.0).all()[0].phase is Phase.ROLLED_BACK


@pytest.mark.parametrize(("body", "field", "words"), [
    ({"model": "m"}, "model", "pattern"),
    ({"model": "/m", "drain_nodes": []}, "model", "not with it"),
    ({"manifest": {}, "copies": [{"layer": 1, "expert": 1, "count": 1}]}, "manifest", "not with it"),
    ({"manifest": "x"}, "manifest", "dictionary"),
])  # fmt: skip
def test_bodies_that_are_refused(body: dict[str, Any], field: str, words: str):
    with pytest.raises(OperationError, match=words) as error:
        parse_operation(body)
    assert error.value.field == field


def test_an_operation_with_a_manifest_finishes_streams_too():
    log = OperationLog()
    operation, _ = log.open(parse_operation({"manifest": {"isa": "avx2"}, "idempotency_key": "k"}), 1.0)
    assert not operation.finishes
    operation.enter(Phase.COMMITTING, 2.0)
    operation.committed = True
    assert log.finishing() is operation and OperationLog.load(log.dump(), 9.0).finishing() is not None
    with pytest.raises(OperationError, match="used for another target"):
        log.known(parse_operation({"manifest": {"isa": "generic"}, "idempotency_key": "k"}))
