"""The fleet's own part in a loss, over Ray calls that are only written down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from virtual_time import run_in_virtual_time

from isotherm.cluster import background
from isotherm.cluster.control.copy_offers import OFFER_SECONDS
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.deploy import fleet as fleet_module
from isotherm.cluster.deploy.fleet import RayFleet
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.copies import CopyOffer, CopySource
from isotherm.cluster.messages.workers import LinkFailure, Locality
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.on_ray.workers import RayWorker, Slot
from isotherm.cluster.placement.table import contiguous_placement


class Ray:
    """What the fleet did, and a head that may be away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ended: list[str] = []
        self.died: list[str] = []
        self.away = 0
        monkeypatch.setattr(background, "FIRST_PAUSE", 0.005)
        monkeypatch.setattr(fleet_module, "end_worker", lambda worker: self.ended.append(worker.id))
        monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in ("aa", "bb")])

    def standing(self) -> None:
        if self.away:
            self.away -= 1
            raise ConnectionError("Ray's head is away")

    def fleet(self) -> RayFleet:
        manifest, checkpoint = parse_manifest({}), Checkpoint.open(bundled_model())
        made = RayFleet("c", 0, manifest, checkpoint, self.died.append, lambda: None, self.standing)
        for name, workers, node in (
            ("attention-0", made.shards, "aa"),
            ("attention-1", made.shards, "aa"),
            ("expert-0", made.groups, "aa"),
            ("expert-1", made.groups, "bb"),
        ):
            workers[name] = RayWorker(name, Slot(None, node, "127.0.0.1"), None)  # type: ignore[arg-type]
        config = checkpoint.config
        made.placement = contiguous_placement(config.moe_layers, config.n_routed_experts, ["expert-0", "expert-1"])
        made.in_service = {"attention-0", "attention-1"}
        return made


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ray]:
    def go(act: Callable[[Ray, RayFleet], Awaitable[Any]]) -> Ray:
        async def run() -> Ray:
            ray = Ray(monkeypatch)
            await act(ray, ray.fleet())
            return ray

        return run_in_virtual_time(run())

    return go


def test_a_loss_is_told_and_carried_out_though_rays_head_is_away(play):
    """The watcher died with the first error, and the loss was never seen."""

    async def act(ray: Ray, fleet: RayFleet) -> None:
        ray.away = 3
        fleet._lost("expert-0", "killed", False)
        fleet._lost("expert-0", "killed again", False)
        assert ray.died == ["expert-0"] and fleet.dead == {"expert-0": "killed"}
        while not ray.ended:
            await asyncio.sleep(0.005)

    assert play(act).ended == ["expert-0"]


def test_who_could_not_be_ended_can_be_ended_again(play, monkeypatch):
    """It was forgotten, and kept its node's resources until the controller was started again."""

    async def act(ray: Ray, fleet: RayFleet) -> None:
        end_worker = fleet_module.end_worker

        def away(worker: RayWorker) -> None:
            monkeypatch.setattr(fleet_module, "end_worker", end_worker)
            raise ConnectionError("Ray's head is away")

        monkeypatch.setattr(fleet_module, "end_worker", away)
        with pytest.raises(ConnectionError):
            await fleet.end("expert-1")
        assert fleet.group_names() == ["expert-0", "expert-1"] and not ray.ended
        await fleet.end("expert-1")
        assert fleet.group_names() == ["expert-0"]

    assert play(act).ended == ["expert-1"]


@pytest.mark.parametrize("reported", ["its sentinel", "its links"])
def test_one_that_was_ended_in_part_is_no_loss(play, monkeypatch, reported: str):
    """Its process was killed, but its place could not be given back: the process was taken for lost a moment later, and
    the terminal told of a worker that nobody wanted as of one that is being replaced."""

    async def act(ray: Ray, fleet: RayFleet) -> None:
        gone = asyncio.Event()

        async def sentinel() -> None:
            await gone.wait()
            raise RayActorError

        actor = SimpleNamespace(sentinel=Call(sentinel), sign_of_life=Call(sentinel))
        worker = RayWorker("expert-1", fleet.groups["expert-1"].slot, actor)  # type: ignore[arg-type]
        fleet.groups["expert-1"] = worker
        fleet._watch.add(worker, has_links=False)
        await asyncio.sleep(0.01)
        end_worker = fleet_module.end_worker

        def half(worker: RayWorker) -> None:
            monkeypatch.setattr(fleet_module, "end_worker", end_worker)
            if reported == "its sentinel":
                gone.set()
            raise ConnectionError("Ray's head is away")

        monkeypatch.setattr(fleet_module, "end_worker", half)
        with pytest.raises(ConnectionError):
            await fleet.end("expert-1")
        if reported == "its links":
            gone.set()
            fleet.repair.report("attention-0", {"expert-1": LinkFailure(1, "connection reset")})
        await asyncio.sleep(1)
        assert not fleet.dead
        await fleet.end("expert-1")
        assert fleet.group_names() == ["expert-0"] and not fleet._ending

    played = play(act)
    assert played.died == [] and played.ended == ["expert-1"]


def test_who_was_not_committed_is_not_in_service(play):
    """A worker that a roll-back could not end got requests from then on, and the autoscaler counted it."""

    async def act(ray: Ray, fleet: RayFleet) -> None:
        fleet.committed(Desired(("expert-0",), ("attention-1",), fleet.placement))
        assert fleet.reachable() == (["attention-1"], None)
        assert fleet.nodes() == ({"expert-0": "aa"}, {"attention-1": "aa"})
        fleet._lost("attention-1", "killed", False)
        fleet.committed(Desired(("expert-0",), ("attention-0", "attention-1"), fleet.placement))
        assert fleet.in_service == {"attention-0"}

    play(act)


def test_one_that_cannot_be_ended_keeps_no_other_from_being_ended(play):
    async def act(ray: Ray, fleet: RayFleet) -> None:
        ray.away = 1
        with pytest.raises(ConnectionError):
            await fleet.end_all()
        assert list(fleet.shards) == ["attention-0"] and not fleet.groups

    assert play(act).ended == ["attention-1", "expert-0", "expert-1"]


def test_shards_that_cannot_reach_every_expert_take_no_requests(play):
    async def act(ray: Ray, fleet: RayFleet) -> None:
        assert fleet.reachable() == (["attention-0", "attention-1"], None)
        fleet.repair.failed["attention-0", "expert-1"] = "connection reset"
        shards, why = fleet.reachable()
        assert (
            shards == ["attention-1"]
            and why is not None
            and "expert-1: connection reset" in why
            and "from attention-0" in why
        )
        fleet._lost("expert-0", "killed", False)
        shards, why = fleet.reachable()
        assert shards == [] and why is not None and "expert-0: killed" in why
        both = contiguous_placement(fleet.placement.layers, 16, ["expert-0"], 2)
        fleet.placement = type(both)(
            2, both.layers, tuple(tuple(("expert-0", "expert-1") for _ in layer) for layer in both.holders)
        )
        assert fleet.reachable()[0] == ["attention-1"], "there is another copy"

    play(act)


def test_a_shard_that_is_cut_off_while_a_group_is_started_is_at_fault_itself(play, monkeypatch):
    """The group that is started has no links that could fail. Those that serve must not be killed for that."""

    async def act(ray: Ray, fleet: RayFleet) -> None:
        fleet.groups["expert-2"] = RayWorker("expert-2", Slot(None, "bb", "127.0.0.1"), None)  # type: ignore[arg-type]
        assert fleet.groups_of("attention-0") == ["expert-0", "expert-1"]

        async def answers(worker: str) -> None:
            pass

        async def link(shard: str, group: str, timeout: float) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(fleet, "answers", answers)
        monkeypatch.setattr(fleet, "link", link)
        failed = {group: LinkFailure(1, "timed out") for group in ("expert-0", "expert-1")}
        fleet.repair.report("attention-0", failed)
        while not ray.ended:
            await asyncio.sleep(0.005)
        await asyncio.sleep(1)

    assert play(act).died == ["attention-0"]


def test_the_node_of_a_worker_that_could_not_be_reached_is_suspect(play):
    async def act(ray: Ray, fleet: RayFleet) -> None:
        fleet._lost("expert-0", "killed", False)
        assert fleet.places.suspected(frozenset()) == frozenset()
        fleet._lost("expert-1", "it hangs", True)
        assert fleet.places.suspected(frozenset()) == {"bb"}

    play(act)


class Call:
    """A method of an actor."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]):
        self.remote = answer


class Group:
    """A group's actor: what it was ordered, and whether it answers."""

    def __init__(self, name: str, hangs: bool = False):
        self.orders: list[tuple[Any, ...]] = []
        self.name, self.hangs = name, hangs
        self.order, self.locality = Call(self._order), Call(self._locality)

    async def _locality(self) -> Locality:
        return Locality("this machine")

    async def _order(self, generation: int, what: str, *args: Any) -> Any:
        self.orders.append((what, *args))
        if self.hangs:
            await asyncio.Event().wait()
        return CopyOffer(self.name, "tiles", b"key", "address") if what == "offer" else None


PAIRS = [(1, 0), (1, 1)]  # held by expert-0


@pytest.mark.parametrize("hangs", [False, True], ids=["", "a peer that hangs"])
def test_who_loads_is_told_of_whom_it_can_copy(play, hangs: bool):
    """Where the peer hangs, the load begins without it all the same, and soon."""
    groups = {name: Group(name, hangs and name == "expert-0") for name in ("expert-0", "expert-1")}

    async def act(ray: Ray, fleet: RayFleet) -> None:
        for name, group in groups.items():
            fleet.groups[name] = RayWorker(name, fleet.groups[name].slot, group)  # type: ignore[arg-type]
        await asyncio.wait_for(fleet.load("expert-1", PAIRS), OFFER_SECONDS + 0.5)

    play(act)
    offer = CopyOffer("expert-0", "tiles", b"key", "address")
    sources = [] if hangs else [CopySource(offer, tuple(PAIRS))]
    assert groups["expert-1"].orders == [("load", PAIRS, sources)]
    assert groups["expert-0"].orders == [("offer", "this machine")]


def test_the_dead_are_not_asked_for_copies(play):
    group = Group("expert-1")

    async def act(ray: Ray, fleet: RayFleet) -> None:
        fleet.groups["expert-1"] = RayWorker("expert-1", fleet.groups["expert-1"].slot, group)  # type: ignore[arg-type]
        fleet.dead["expert-0"] = "killed"
        await fleet.load("expert-1", PAIRS)

    play(act)
    assert group.orders == [("load", PAIRS, [])]


class Loading:
    """A worker that loads from when it is told to until `done`, and says how far it is if it answers."""

    def __init__(self, answers: bool) -> None:
        self.read, self.done, self._answers = 0, asyncio.Event(), answers

    async def call(self, what: str) -> Any:
        assert what == "status"
        if not self._answers:
            await asyncio.sleep(1e6)
        return {"read_bytes": self.read}


class Waiting:
    """A shard that counts how often it is told to wait on."""

    def __init__(self) -> None:
        self.told = 0

    async def call(self, what: str) -> None:
        assert what == "expect_experts"
        self.told += 1


def test_who_loads_says_how_much_it_has_read_until_it_is_done(play, monkeypatch):
    """Who says nothing is left out, and who loads nothing: a recovery goes on as long as something new is said, and the
    shards that are in service wait as long for its experts."""

    async def act(ray: Ray, fleet: RayFleet) -> None:
        loading, shard = {"expert-0": Loading(True), "expert-1": Loading(False)}, Waiting()
        workers: dict[str, Any] = loading | dict.fromkeys(fleet.in_service, shard)
        assert fleet.in_service and fleet.in_service <= fleet.shards.keys()
        monkeypatch.setattr(RayWorker, "call", lambda self, what: workers[self.id].call(what))
        monkeypatch.setattr(fleet, "_order", lambda worker, *_: worker.done.wait())
        monkeypatch.setattr(fleet, "_copy_sources", lambda *_: asyncio.sleep(0, []))
        assert await fleet.loaded() == {} and not shard.told
        for name, worker in loading.items():
            fleet.groups[name] = RayWorker(name, fleet.groups[name].slot, worker)  # type: ignore[arg-type]
        loads = [asyncio.ensure_future(fleet.load(name, [(1, 0)])) for name in loading]
        await asyncio.sleep(0.1)
        assert await fleet.loaded() == {"expert-0": 0} and shard.told == len(fleet.in_service)
        assert await fleet.loaded() == {"expert-0": 0} and shard.told == len(fleet.in_service), "of a disk that hangs"
        workers["expert-0"].read = 7
        assert await fleet.loaded() == {"expert-0": 7} and shard.told == 2 * len(fleet.in_service)
        for worker in loading.values():
            worker.done.set()
        await asyncio.gather(*loads)
        assert await fleet.loaded() == {}

    play(act)
