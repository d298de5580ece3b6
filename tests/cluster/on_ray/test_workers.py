"""Who asks Ray's head from an event loop does so in a thread: while the head is away such a call blocks, and the loop
has others to serve."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.on_ray import workers

ROOT = Path(__file__).resolve().parents[3]


class PlacementGroups:
    """Ray's, of which only one is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.removed: list[Any] = []
        self.nodes = [{"NodeID": "aa", "NodeManagerAddress": "127.0.0.1"}]
        self.placed = asyncio.Event()
        self.fails = False
        monkeypatch.setattr(workers, "placement_group", lambda *_, **__: self)
        monkeypatch.setattr(workers, "placement_group_table", lambda _: {"bundles_to_node_id": {0: "aa"}})
        monkeypatch.setattr(workers, "remove_placement_group", self.removed.append)
        monkeypatch.setattr(workers.ray, "nodes", lambda: self.nodes)

    async def ready(self) -> None:
        await self.placed.wait()
        if self.fails:
            raise ConnectionError("Ray's head is away")


@pytest.mark.parametrize("what", ["ready", "node", "cancelled", "nothing"])
def test_a_place_that_comes_to_nothing_is_removed(what: str, monkeypatch: pytest.MonkeyPatch):
    """Else Ray's autoscaler would have a node come for it, or nobody else could use it."""

    async def act() -> None:
        ray = PlacementGroups(monkeypatch)
        reserving = asyncio.ensure_future(workers.reserve("isotherm-c:expert-0", {"CPU": 1.0}))
        await asyncio.sleep(0)
        if what == "cancelled":
            reserving.cancel()
        if what == "node":  # it has died in that instant
            ray.nodes.clear()
        ray.fails = what == "ready"
        ray.placed.set()
        (outcome,) = await asyncio.gather(reserving, return_exceptions=True)
        assert isinstance(outcome, workers.Slot) is (what == "nothing")
        assert ray.removed == ([] if what == "nothing" else [ray])

    asyncio.run(act())


def test_the_place_of_a_worker_that_ray_refuses_is_removed(monkeypatch: pytest.MonkeyPatch):
    ray = PlacementGroups(monkeypatch)

    def refuse(_: type) -> Any:
        raise ValueError("the name is taken")

    monkeypatch.setattr(workers.ray, "remote", refuse)
    with pytest.raises(ValueError, match="taken"):
        workers.start_worker("expert-0", workers.Slot(ray, "aa", "127.0.0.1"), {}, object)  # type: ignore[arg-type]
    assert ray.removed == [ray]


# --- in the code ----------------------------------------------------------------------------------

ASKS_THE_HEAD = {
    "ray.available_resources", "ray.cluster_resources", "ray.get", "ray.get_actor", "ray.kill", "ray.nodes",
    "ray.wait", "_internal_kv_del", "_internal_kv_get", "_internal_kv_list", "_internal_kv_put", "actors",
    "end_worker", "find_controller", "find_worker", "find_workers", "list_named_actors", "placement_group",
    "placement_group_table", "release_slot", "remove_placement_group",
}  # fmt: skip
# On the controller's loop, which serves no tokens, and where what is begun must be whole when it is cancelled: a place
# that Ray has given is used or given back, and a worker that has been taken off the list is ended.
MAY = {
    ("cluster/deploy/fleet.py", "end", "end_worker"),
    ("cluster/on_ray/workers.py", "reserve", "placement_group"),
    ("cluster/on_ray/workers.py", "reserve", "placement_group_table"),
    ("cluster/on_ray/workers.py", "reserve", "remove_placement_group"),
}


def calls_on_the_loop(coroutine: ast.AsyncFunctionDef) -> Iterator[str]:
    """What it calls itself, by the names that it uses; functions inside it may run elsewhere."""
    left: list[ast.AST] = [*coroutine.body]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        left += ast.iter_child_nodes(node)


@pytest.mark.parametrize(("error", "lost"), [
    (ActorDiedError(), True), (WorkerGoneError("attention-0 is gone"), True),
    (RayActorError(actor_init_failed=True), False), (ValueError("no room"), False),
])  # fmt: skip
def test_a_worker_that_says_what_is_wrong_is_not_lost(error: Exception, lost: bool):
    assert workers.is_loss(error) is lost


def test_no_other_coroutine_waits_for_the_head():
    found = {
        (str(path.relative_to(ROOT)), coroutine.name, called)
        for package in ("cluster", "actors")
        for path in (ROOT / package).rglob("*.py")
        for coroutine in ast.walk(ast.parse(path.read_text()))
        if isinstance(coroutine, ast.AsyncFunctionDef)
        for called in calls_on_the_loop(coroutine)
        if called in ASKS_THE_HEAD
    }
    assert found == MAY
