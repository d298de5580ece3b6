"""When Serve's proxy is taken for lost, and what is done then; without a Ray."""

from __future__ import annotations

import threading

import pytest
from waiting import until

from isotherm.cluster.deploy import proxy_revival
from isotherm.cluster.deploy.proxy_revival import MISSING_SECONDS, ProxyRevival

THERE, CONTROLLER = "SERVE_PROXY_ACTOR-0a1b", "SERVE_CONTROLLER_ACTOR"


def test_a_proxy_that_serve_starts_again_is_not_lost():
    revival = ProxyRevival()
    assert not revival.lost(10.0, [CONTROLLER])
    assert not revival.lost(10.0 + MISSING_SECONDS - 0.1, [CONTROLLER])
    assert not revival.lost(10.0 + MISSING_SECONDS, [CONTROLLER, THERE])  # it is being started
    assert not revival.lost(11.0 + MISSING_SECONDS, [CONTROLLER])  # and has died again


def test_an_outage_that_is_over_says_nothing_of_the_next():
    """Nobody looks in between, so that its last look may have found no proxy, or a controller that was ended."""
    revival = ProxyRevival()
    assert not revival.lost(10.0, [CONTROLLER])
    assert not revival.lost(500.0, [CONTROLLER])
    assert revival.lost(500.1 + MISSING_SECONDS, [CONTROLLER])
    assert not revival.lost(900.0, [CONTROLLER])
    assert revival.lost(900.1 + MISSING_SECONDS, [CONTROLLER])


def test_one_that_nobody_starts_is_lost_and_a_new_controller_has_time_to_start_it():
    revival = ProxyRevival()
    found = [second for second in range(30) if revival.lost(10.0 + second, [CONTROLLER])]
    assert found == [2, 12, 22]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, bool]]:
    killed: list[tuple[object, bool]] = []
    monkeypatch.setattr(proxy_revival.ray, "get_actor", lambda name, namespace: (namespace, name))
    monkeypatch.setattr(proxy_revival.ray, "kill", lambda actor, no_restart: killed.append((actor, no_restart)))
    monkeypatch.setattr(proxy_revival, "MISSING_SECONDS", 0.0)
    return killed


def test_serves_controller_is_ended_so_that_ray_starts_it_again(killed, monkeypatch: pytest.MonkeyPatch):
    elsewhere = {"name": THERE, "namespace": "another"}  # an actor of somebody's own
    monkeypatch.setattr(proxy_revival, "list_named_actors", lambda all_namespaces: [elsewhere])
    ProxyRevival().look()
    until(lambda: killed == [(("serve", CONTROLLER), False)])


def test_a_proxy_that_is_there_is_left_alone_and_looks_do_not_pile_up(killed, monkeypatch: pytest.MonkeyPatch):
    asked, answer = threading.Semaphore(0), threading.Event()

    def actors(all_namespaces: bool) -> list[dict[str, str]]:
        asked.release()
        answer.wait(10)
        return [{"name": THERE, "namespace": "serve"}]

    monkeypatch.setattr(proxy_revival, "list_named_actors", actors)
    revival = ProxyRevival()
    for _ in range(5):
        revival.look()
    assert asked.acquire(timeout=10) and not asked.acquire(timeout=0.1)
    answer.set()
    until(lambda: not revival._looking.locked())
    revival.look()  # after the answer there is another
    assert asked.acquire(timeout=10)
    until(lambda: not revival._looking.locked())
    assert killed == []


def test_a_controller_that_is_being_started_again_is_no_error(killed, monkeypatch: pytest.MonkeyPatch):
    def missing(_name: str, namespace: str) -> object:
        raise ValueError(f"no such actor in {namespace}")

    monkeypatch.setattr(proxy_revival, "list_named_actors", lambda all_namespaces: [])
    monkeypatch.setattr(proxy_revival.ray, "get_actor", missing)
    revival = ProxyRevival()
    revival.look()
    until(lambda: not revival._looking.locked())
    assert killed == []
