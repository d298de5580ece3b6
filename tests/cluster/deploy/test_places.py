"""Where places are asked for, with a Ray that only writes it down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from isotherm.cluster import background
from isotherm.cluster.deploy import places as places_module
from isotherm.cluster.deploy.places import Places
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.on_ray.workers import Slot


class Ray:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, str]] = []  # labels of the places that were asked for
        self.full: set[str] = set()  # label selectors for which there is no place
        self.nodes = ["aa", "bb"]
        self.released: list[Any] = []
        self.changes = 0
        self.stands: list[bool] = []  # whether it can be seen that this is the newest controller, call by call
        self.on_placed: Callable[[], None] = lambda: None  # called when Ray has placed one, before anybody knows
        monkeypatch.setattr(places_module, "SUSPECT_PATIENCE", 0.05)
        monkeypatch.setattr(places_module, "PLACE_TIMEOUT", 0.02)
        monkeypatch.setattr(places_module, "reserve", self.reserve)
        monkeypatch.setattr(places_module, "release_slot", self.released.append)
        monkeypatch.setattr(places_module.ray, "nodes", lambda: [{"NodeID": n, "Alive": True} for n in self.nodes])
        monkeypatch.setattr(places_module.ray, "available_resources", lambda: {"CPU": 1.0})

    async def reserve(self, name: str, resources: dict[str, float], labels: dict[str, str]) -> Slot:
        self.asked.append(labels)
        while labels.get("ray.io/node-id", "anywhere") in self.full:
            await asyncio.sleep(0.005)
        self.on_placed()
        return Slot(None, "bb" if labels else "aa", "127.0.0.1")  # type: ignore[arg-type]

    def changed(self) -> None:
        self.changes += 1

    def places(self, **sections: Any) -> Places:
        return Places("isotherm-c:", parse_manifest(sections), self.changed, self.standing)

    def standing(self) -> None:
        if self.stands and not self.stands.pop(0):
            raise ConnectionError("Ray's head is away")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


def run(act: Callable[[], Any]) -> None:
    asyncio.run(act())


def test_nothing_is_started_on_a_suspect_node(ray):
    async def act() -> None:
        places = ray.places()
        await places.reserve("expert-2", frozenset())
        assert ray.asked[-1] == {}
        places.suspect("bb")
        await places.reserve("expert-3", frozenset())
        assert ray.asked[-1] == {"ray.io/node-id": "!in(bb)"}
        ray.full.add("!in(bb)")  # there is no room elsewhere
        await places.reserve("expert-4", frozenset())
        assert ray.asked[-2:] == [{"ray.io/node-id": "!in(bb)"}, {}]
        ray.nodes = ["bb"]
        await places.reserve("expert-5", frozenset())
        assert ray.asked[-1] == {}, "there is no other node"

    run(act)


def test_where_only_suspect_nodes_have_room_it_is_not_the_newest(ray):
    async def act() -> None:
        places = ray.places()
        ray.nodes = ["aa", "bb", "cc"]
        places.suspect("bb")
        await asyncio.sleep(0.01)
        places.suspect("aa")
        ray.full.add("!in(aa,bb)")
        await places.reserve("expert-2", frozenset())
        assert [asked["ray.io/node-id"] for asked in ray.asked] == ["!in(aa,bb)", "!in(aa)"]

    run(act)


def test_a_node_is_suspect_for_a_while_only(ray, monkeypatch):
    places = ray.places()
    places.suspect("bb")
    assert places.suspected(frozenset()) == {"bb"}
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert places.suspected(frozenset()) == frozenset()


def test_a_reserved_place_is_taken_once_or_given_back(ray):
    async def act() -> None:
        places = ray.places()
        for worker in ("expert-0", "expert-1", "attention-0"):
            await places.reserve(worker, frozenset())
        assert places.nodes_of_groups() == ["aa", "aa"]
        await places.take("expert-0", frozenset())
        assert len(ray.asked) == 3
        await places.take("expert-0", frozenset({"aa"}))
        assert ray.asked[3:] == [{"ray.io/node-id": "!in(aa)"}]
        places.release("expert-1")
        places.release("expert-1")
        assert len(ray.released) == 1
        places.release_all()
        assert len(ray.released) == 2 and places.nodes_of_groups() == []

    run(act)


def test_a_worker_that_waits_says_for_what(ray):
    async def act() -> None:
        places = ray.places(experts={"cpus": 2, "labels": {"kind": "big"}})
        ray.full.add("anywhere")
        waiting = asyncio.ensure_future(places.reserve("expert-0", frozenset()))
        while not places.waits:
            await asyncio.sleep(0.005)
        words = places.waits["expert-0"]
        assert "2 CPU" in words and "'kind': 'big'" in words and "free in the whole cluster: 1 CPU" in words
        ray.full.clear()
        await waiting
        assert not places.waits and ray.changes == 2

    run(act)


def test_a_place_that_may_not_be_used_is_given_back(ray):
    """Where Ray's head was away in that instant, the placement group stayed until the controller was started again."""

    async def act() -> None:
        places = ray.places()
        ray.stands = [True, False]
        with pytest.raises(ConnectionError, match="away"):
            await places.reserve("expert-0", frozenset())
        assert len(ray.released) == len(ray.asked) == 1 and not places.nodes_of_groups()

    run(act)


@pytest.mark.parametrize("moments", range(7))
def test_a_place_is_given_back_whenever_its_caller_gives_up(ray, moments):
    """So many moments after Ray has placed it; or else it is kept."""

    async def act() -> None:
        places, loop = ray.places(), asyncio.get_running_loop()

        def cancel_in(moments: int) -> None:
            if moments:
                loop.call_soon(cancel_in, moments - 1)
            else:
                reserving.cancel()

        ray.on_placed = lambda: cancel_in(moments)
        reserving = asyncio.ensure_future(places.reserve("expert-0", frozenset()))
        await asyncio.wait([reserving])
        assert len(ray.asked) == 1
        assert len(ray.released) + len(places.nodes_of_groups()) == 1, "it is lost"
        assert reserving.cancelled() is bool(ray.released)

    run(act)


def test_what_cannot_be_given_back_now_is_later(ray, monkeypatch):
    async def act() -> None:
        tries = []

        def release(slot: Slot) -> None:
            tries.append(slot)
            if len(tries) < 3:
                raise ConnectionError("Ray's head is away")

        monkeypatch.setattr(places_module, "release_slot", release)
        monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)
        places = ray.places()
        await places.reserve("expert-0", frozenset())
        places.release("expert-0")
        while len(places._background):
            await asyncio.sleep(0.005)
        assert len(tries) == 3

    run(act)
