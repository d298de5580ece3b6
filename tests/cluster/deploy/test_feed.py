"""The controller's event stream over parts of a controller that are only written down: who is told what, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster.deploy import feed
from isotherm.cluster.deploy.feed import ClusterFeed
from isotherm.cluster.messages.feed import FeedPart
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.placement.table import contiguous_placement

PLACEMENT = contiguous_placement((1,), 4, ("expert-0", "expert-1"))


class Controller:
    """Its parts, as the feed sees them. Looking at the workers takes `takes` seconds."""

    def __init__(self) -> None:
        self.now, self.takes, self.looks = 0.0, 0.0, 0
        self.fails: Exception | None = None
        self.shard = {"id": "attention-0", "running": 0}
        self.log: list[dict[str, Any]] = []
        self.mode = "on"
        self.pins: set[tuple[int, int]] = set()
        fleet = SimpleNamespace(placement=PLACEMENT, group_names=lambda: ["expert-0", "expert-1"])
        self.autoscale = SimpleNamespace(
            metered=None,
            told_loads=lambda: ([{"name": "expert-0", "node": "n", "busy": 0.5}], []),
            rates=lambda: np.array([[3.0, 0.0, 1.0, 0.0]]),
            report=lambda: {"mode": self.mode, "groups": [], "shards": [], "decisions": []},
        )
        self.feed = ClusterFeed(
            fleet, self.autoscale, self.status, lambda: self.log, lambda: self.pins, lambda: self.now  # type: ignore[arg-type]
        )  # fmt: skip

    async def status(self) -> dict[str, Any]:
        self.looks += 1
        await asyncio.sleep(self.takes)
        if self.fails is not None:
            raise self.fails
        workers = [dict(self.shard), {"id": "expert-0"}, {"id": "expert-1"}]
        return {
            "controller": {"phase": "serving", "uptime_seconds": self.looks},
            "placement_version": 1,
            "workers": workers,
            "nodes": [{"id": "n"}],
        }


def played(scene: Callable[[Controller], Awaitable[None]]) -> None:
    async def go() -> None:
        controller = Controller()
        try:
            await scene(controller)
        finally:
            await controller.feed._background.close()

    run_in_virtual_time(go())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PERIOD", 0.01)
    monkeypatch.setattr(feed, "WAIT", 0.3)


async def told(controller: Controller, last: str = "") -> FeedPart:
    part = await controller.feed.part(last)
    assert part is not None
    return part


def test_all_there_is_first_and_then_what_changes():
    async def scene(c: Controller) -> None:
        first = await told(c)
        assert first.snapshot and c.looks == 1
        assert first.values["cluster"] == {"controller": {"phase": "serving"}, "placement_version": 1}
        assert first.values["worker/expert-0"] == {"id": "expert-0", "load": {"busy": 0.5}}
        assert first.values["layer/1"]["holders"] == [["expert-0"], ["expert-0"], ["expert-1"], ["expert-1"]]
        assert first.values["heat/groups"] == {"expert-0": 1.5, "expert-1": 0.5}
        assert first.values["autoscaler"]["mode"] == "on"
        c.shard["running"] = 2
        second = await told(c, first.id)
        assert not second.snapshot and second.values == {"worker/attention-0": {"id": "attention-0", "running": 2}}
        assert await c.feed.part(second.id) is None, "uptime is no news"
        other = await told(c, "another-controller:5")
        assert other.snapshot and other.values.keys() == first.values.keys()

    played(scene)


def test_workers_are_asked_once_for_all_who_listen_and_not_at_all_for_nobody(monkeypatch):
    async def scene(c: Controller) -> None:
        c.takes = 0.02
        parts = await asyncio.gather(*(told(c) for _ in range(20)))
        assert c.looks == 1 and len({part.id for part in parts}) == 1
        c.now += feed.HEARD + 1
        await asyncio.sleep(0.1)
        looks = c.looks
        await asyncio.sleep(0.1)
        assert c.looks == looks
        c.feed.tell()
        c.shard["running"] = 7
        later = await told(c, parts[0].id)
        assert later.values == {"worker/attention-0": {"id": "attention-0", "running": 7}}, "not what it was then"

    played(scene)


def test_operations_are_told_at_once_and_as_they_were_then(monkeypatch):
    monkeypatch.setattr(feed, "PERIOD", 60.0)

    async def scene(c: Controller) -> None:
        first = await told(c)
        waiting = asyncio.ensure_future(told(c, first.id))
        await asyncio.sleep(0.01)
        c.log = [{"id": "op-1", "phase": "preparing", "reasons": []}]
        c.pins, c.mode = {(1, 3)}, "off"
        c.feed.tell()
        part = await waiting
        c.log[0]["reasons"].append("later")
        assert part.values["operation/op-1"] == {"id": "op-1", "phase": "preparing", "reasons": []}
        assert part.values["layer/1"]["pinned"] == [3] and part.values["autoscaler"]["mode"] == "off"
        assert c.looks == 1

    played(scene)


def test_what_meters_say_is_kept_for_who_comes_later():
    def meters(tokens: int, rows: int) -> Any:
        shard = ShardMeter(4, 0, 128, 0.2, tokens, 0, 0.1, 0.0, {}, np.array([[rows, 0, 0, rows]]), np.zeros((1, 4)))
        return {"attention-0": shard}, {"expert-0": GroupMeter(0, 1, 1, 0.5, 0.0, 2, 100)}

    async def scene(c: Controller) -> None:
        c.autoscale.metered(*meters(0, 0), 10.0)
        c.autoscale.metered(*meters(50, 20), 12.0)
        values = (await told(c)).values
        assert values["sample/1"]["tokens_per_second"] == 25.0
        assert values["flows"] == {"attention-0": {"expert-0": 10.0, "expert-1": 10.0}}

    played(scene)


def test_who_listens_is_told_that_the_cluster_cannot_be_looked_at():
    """And not that nothing is there, or that nothing changes; until it can be again."""

    async def scene(c: Controller) -> None:
        c.fails = ConnectionError("the head is away")
        with pytest.raises(WorkerGoneError, match="cannot be looked at.*the head is away"):
            await c.feed.part("")
        c.fails = None
        while True:
            try:
                first = await told(c)
                break
            except WorkerGoneError:
                await asyncio.sleep(0.01)
        assert "worker/attention-0" in first.values
        waiting = asyncio.ensure_future(c.feed.part(first.id))
        await asyncio.sleep(0.02)
        c.fails = ConnectionError("again")
        with pytest.raises(WorkerGoneError, match="again"):
            await waiting

    played(scene)


def test_a_look_that_takes_long_is_waited_for_and_is_not_an_empty_cluster():
    async def scene(c: Controller) -> None:
        c.takes = 60.0
        assert await c.feed.part("") is None
        assert await c.feed.part("") is None and c.looks == 1

    played(scene)
