"""Which of the revisions serves, and what is written down when that changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.deploy.revision import Revision
from isotherm.cluster.deploy.revisions import Revisions
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.operations import OperationLog, Phase, parse_operation
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.placement.table import contiguous_placement

MANIFEST = parse_manifest({})


class Fleet:
    """Two workers, of which one may be dead."""

    def __init__(self, number: int):
        self.groups, self.shards = {f"expert-{number}": None}, {f"attention-{number}": None}
        self.dead: dict[str, str] = {}
        self.waits = {f"expert-{number}": "a node"}
        self.placement = contiguous_placement((1,), 2, list(self.groups), version=number + 1)
        self.numerics = SimpleNamespace(dump=lambda: "", system_fingerprint=f"isotherm-{number}")

    def group_names(self) -> list[str]:
        return list(self.groups)

    def shard_names(self) -> list[str]:
        return list(self.shards)

    def reachable(self) -> tuple[list[str], None]:
        return [s for s in self.shards if s not in self.dead], None


def revision(number: int) -> Revision:
    made = Revision(
        number, MANIFEST, Checkpoint.open(bundled_model()), Fleet(number), OperationLog(), lambda: None, lambda: None  # type: ignore[arg-type]
    )  # fmt: skip
    fleet = made.fleet
    made.reconfigurer.desired = Desired(tuple(fleet.groups), tuple(fleet.shards), fleet.placement)
    return made


class Cluster:
    """With revision 0 serving and revision 1 started."""

    def __init__(self) -> None:
        self.saved: list[Any] = []
        self.healed: list[int] = []
        self.swaps = 0
        self.fails = False
        never: Any = None
        self.revisions = Revisions(
            lambda: MANIFEST, "/models/0", revision(0), OperationLog(), never, self.save, lambda: None, self.swapped
        )
        self.coming = self.revisions.coming = revision(1)
        for one in (self.revisions.serving, self.coming):
            one.reconfigurer.heal = lambda number=one.number: self.healed.append(number)  # type: ignore[method-assign]

    def save(self) -> None:
        if self.fails:
            raise ConnectionError("Ray's head is away")
        self.saved.append(self.revisions.saved())

    def swapped(self) -> None:
        self.swaps += 1


def test_one_takes_over_when_that_is_written_down():
    c = Cluster()
    assert c.revisions.shards_of_others() == {1: ("attention-1",)}
    c.revisions.take_over(c.coming)
    ((serving, leaving, _),) = c.saved
    assert (serving.number, leaving.number) == (1, 0) and serving.workers == ("expert-1", "attention-1")
    assert c.swaps == 1 and c.revisions.coming is None
    assert c.revisions.shards_of_others() == {0: ("attention-0",)}
    assert c.revisions.placement.version == 2 and c.revisions.group_names() == ["expert-1"]


def test_what_cannot_be_written_down_has_not_happened():
    c = Cluster()
    c.fails = True
    with pytest.raises(ConnectionError):
        c.revisions.take_over(c.coming)
    assert [r.number for r in c.revisions.there()] == [0, 1] and c.revisions.leaving is None and not c.swaps


def test_one_that_has_lost_a_worker_does_not_take_over():
    c = Cluster()
    c.coming.fleet.dead = {"expert-1": "killed"}
    with pytest.raises(RuntimeError, match="expert-1 was lost: killed"):
        c.revisions.take_over(c.coming)
    assert c.revisions.serving.number == 0 and not c.saved


def test_before_it_is_committed_nobody_of_it_is_replaced():
    c = Cluster()
    assert not c.revisions.died(1) and c.revisions.died(0)
    c.revisions.take_over(c.coming)
    assert c.revisions.died(1) and c.revisions.died(0) and not c.revisions.died(7)
    assert c.healed == [0, 1, 0]


def test_what_an_operation_waits_for_is_told_of_whichever_revision():
    c = Cluster()
    operation, _ = OperationLog().open(parse_operation({"model": "/m"}), 1.0)
    operation.plan = ["start expert-1"]
    assert c.revisions.told(operation)["waiting"] == ["a node"]
    operation.enter(Phase.DONE, 2.0)
    assert c.revisions.told(operation)["waiting"] == []


@pytest.mark.parametrize(
    ("asked", "grows"),
    [({}, False), ({"attention_shards": 1}, True), ({"attention_shards": 2}, False), ({"expert_groups": 1}, False)],
)
def test_one_that_began_smaller_grows_when_there_is_room(asked: dict[str, int], grows: bool):
    """But where its size was changed meanwhile, which is how it differs from what was asked for."""
    c = Cluster()
    grown: list[tuple[int, int]] = []
    c.revisions.serving.reconfigurer.restore = lambda groups, shards, _: grown.append((groups, shards))  # type: ignore[method-assign]
    operation, _ = OperationLog().open(parse_operation({"model": "/m", **asked}), 1.0)
    before = c.coming.reconfigurer.desired
    more = Desired(before.groups, (*before.shards, "attention-7", "attention-8"), before.placement)
    c.revisions._grow(more if asked else before, operation)
    assert grown == ([(1, 3)] if grows else [])
