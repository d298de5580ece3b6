"""How the controller finds Ray Serve's replica of the ingress, and what it is told where Ray cannot reach it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError

from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.on_ray import ingress_replica
from isotherm.cluster.on_ray.ingress_replica import IngressReplica

OURS = {"namespace": "serve", "name": "SERVE_REPLICA::isotherm#Ingress#ab12cd34"}
OTHERS = [
    {"namespace": "serve", "name": "SERVE_REPLICA::isotherm#Ingress#zz12cd34"},
    {"namespace": "serve", "name": "SERVE_CONTROLLER_ACTOR"},
    {"namespace": "somebody's", "name": OURS["name"]},
]


class FakeRay:
    """Knows some named actors. `calls`: what they are asked, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *named: dict[str, str]) -> None:
        self.named = list(named)
        self.calls: list[str] = []
        self.found: list[str] = []
        self.killed: list[Any] = []
        self.error: Exception | None = None
        self.threads: list[threading.Thread] = []
        monkeypatch.setattr(ingress_replica, "list_named_actors", self._list)
        fake = SimpleNamespace(get_actor=self._get_actor, kill=self._kill)
        monkeypatch.setattr(ingress_replica, "ray", fake)

    def _list(self, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        self.threads.append(threading.current_thread())
        if self.error is not None:
            raise self.error
        return self.named

    def _get_actor(self, name: str, namespace: str) -> Any:
        assert namespace == "serve"
        self.found.append(name)
        methods = ("was_initialized", "get_num_ongoing_requests")
        return SimpleNamespace(**{method: SimpleNamespace(remote=self._asked(method)) for method in methods})

    def _asked(self, method: str) -> Callable[[], Any]:
        async def remote() -> None:
            self.calls.append(method)
            if self.error is not None:
                raise self.error

        return remote

    def _kill(self, actor: Any) -> None:
        self.threads.append(threading.current_thread())
        self.killed.append(actor)


def test_it_is_found_by_serves_id_and_once(monkeypatch: pytest.MonkeyPatch):
    there = FakeRay(monkeypatch, *OTHERS, OURS)

    async def act() -> None:
        replica = IngressReplica("ingress-ab12cd34")
        await replica.reach()
        await replica.answer()
        await replica.stir()
        await replica.kill()

    asyncio.run(act())
    assert there.found == [OURS["name"]]
    # Of Serve's own methods the first runs on the event loop that serves requests, the second in a thread beside it.
    assert there.calls == ["was_initialized", "get_num_ongoing_requests"] and len(there.killed) == 1
    assert threading.main_thread() not in there.threads, "Ray's head may be away for long"


def test_serve_has_the_methods_that_it_is_asked():
    """They are Serve's own, of no public interface."""
    from ray.serve._private.replica import ReplicaActor

    methods = (getattr(ReplicaActor, name) for name in ("was_initialized", "get_num_ongoing_requests"))
    assert all(map(callable, methods))


def test_one_that_ray_does_not_know_is_gone(monkeypatch: pytest.MonkeyPatch):
    FakeRay(monkeypatch, *OTHERS)
    with pytest.raises(WorkerGoneError, match="Ray knows no replica ab12cd34"):
        asyncio.run(IngressReplica("ingress-ab12cd34").reach())


@pytest.mark.parametrize("error", [RayError("the head\nis away"), RayActorError(), ValueError("no such actor")])
def test_one_that_cannot_be_looked_for_is_gone(error: Exception, monkeypatch: pytest.MonkeyPatch):
    FakeRay(monkeypatch, OURS).error = error
    with pytest.raises(WorkerGoneError) as caught:
        asyncio.run(IngressReplica("ingress-ab12cd34").reach())
    assert str(caught.value) and "\n" not in str(caught.value)


def test_one_that_dies_while_it_is_asked_is_gone(monkeypatch: pytest.MonkeyPatch):
    there = FakeRay(monkeypatch, OURS)

    async def act() -> None:
        replica = IngressReplica("ingress-ab12cd34")
        await replica.reach()
        await replica.answer()
        there.error = RayActorError()
        with pytest.raises(WorkerGoneError):
            await replica.stir()

    asyncio.run(act())
