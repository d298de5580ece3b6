"""What is said of lost ingress replicas and proxies, from Ray's table as it changes; without a Ray."""

from __future__ import annotations

import dataclasses

import pytest
from ray.exceptions import GetTimeoutError, RayError

from isotherm.cluster.deploy import front_door_losses
from isotherm.cluster.deploy.front_door_losses import FrontDoorLosses, FrontDoorWatch
from isotherm.cluster.on_ray.front_door_actors import FrontDoorActor

PROXY = FrontDoorActor("p1", "SERVE_PROXY_ACTOR-0a", 11, True, False)
REPLICA = FrontDoorActor("r1", "SERVE_REPLICA::isotherm#ingress#x7", 21, True, False)
PROXY_LOST = "HTTP proxy (process 11) is lost; Ray Serve starts it again, and the connections that it had are closed"
REPLICA_LOST = (
    "ingress replica ingress-x7 (process 21) is lost; Ray Serve starts another, and the streams that it had end with "
    "an error event"
)


def gone(actor: FrontDoorActor, crashed: bool = True) -> FrontDoorActor:
    return dataclasses.replace(actor, alive=False, crashed=crashed)


class Table:
    """Ray's; counts how often it is asked for. `hung`: whom the controller's watch has killed; None: it is away."""

    def __init__(self, *actors: FrontDoorActor) -> None:
        self.asked, self.killed_asked = 0, 0
        self.hung: list[str] | None = []
        self.losses = FrontDoorLosses(self.actors, self.killed)
        assert self.look(*actors) == []

    def actors(self) -> tuple[FrontDoorActor, ...]:
        self.asked += 1
        return self.now

    def killed(self) -> list[str]:
        self.killed_asked += 1
        if self.hung is None:
            raise GetTimeoutError("the controller is away")
        return self.hung

    def look(self, *actors: FrontDoorActor, starting: str = "") -> list[str]:
        self.now = actors
        return self.losses.lines(frozenset(filter(None, [*(a.name for a in actors if a.alive), starting])))


def test_a_loss_and_what_is_started_in_its_place_are_each_said_once():
    table = Table(PROXY, REPLICA)
    assert table.look(gone(PROXY), REPLICA) == [PROXY_LOST]
    assert table.look(gone(PROXY), REPLICA, starting=PROXY.name) == []
    again = dataclasses.replace(PROXY, id="p2", pid=12)
    both = gone(PROXY), REPLICA, again
    assert table.look(*both) == ["HTTP proxy (process 12) was started in the place of process 11"]
    assert table.look(*both) == []
    assert table.look(gone(PROXY), gone(REPLICA), again) == [REPLICA_LOST]
    other = dataclasses.replace(REPLICA, id="r2", name="SERVE_REPLICA::isotherm#ingress#y8", pid=22)
    said = table.look(gone(PROXY), gone(REPLICA), again, other)
    assert said == ["ingress replica ingress-y8 (process 22) was started in the place of process 21"]


def test_what_serve_itself_ends_is_no_loss():
    """An update of the ingress starts the new replicas first."""
    table = Table(PROXY, REPLICA)
    other = dataclasses.replace(REPLICA, id="r2", name="SERVE_REPLICA::isotherm#ingress#y8", pid=22)
    assert table.look(PROXY, REPLICA, other) == [] and table.look(PROXY, gone(REPLICA, False), other) == []


def test_one_that_hung_and_was_killed_is_a_loss_though_ray_has_it_as_ended_by_serve():
    table = Table(PROXY, REPLICA)
    table.hung = ["ingress-x7"]
    assert table.look(PROXY, gone(REPLICA, False)) == [
        REPLICA_LOST.replace(" lost;", " lost: it hung, and was killed;")
    ]
    assert table.look(PROXY, gone(REPLICA, False)) == []
    other = dataclasses.replace(REPLICA, id="r2", name="SERVE_REPLICA::isotherm#ingress#y8", pid=22)
    started = ["ingress replica ingress-y8 (process 22) was started in the place of process 21"]
    assert table.look(PROXY, gone(REPLICA, False), other) == started
    assert table.killed_asked == 1


def test_why_one_has_ended_is_asked_again_where_the_controller_is_away():
    table = Table(PROXY, REPLICA)
    table.hung = None
    with pytest.raises(RayError):
        table.look(PROXY, gone(REPLICA, False))
    table.hung = ["ingress-x7"]
    assert len(table.look(PROXY, gone(REPLICA, False))) == 1


def test_the_controller_is_not_asked_for_what_has_crashed():
    table = Table(PROXY, REPLICA)
    table.hung = None
    assert table.look(gone(PROXY), gone(REPLICA)) == [PROXY_LOST, REPLICA_LOST]


def test_who_was_gone_before_the_first_look_is_not_spoken_of():
    table = Table(gone(PROXY), REPLICA)
    assert table.look(gone(PROXY), REPLICA, dataclasses.replace(PROXY, id="p2")) == []


def test_ray_is_asked_for_all_of_them_only_where_something_has_changed():
    table = Table(PROXY, REPLICA)
    for _ in range(5):
        table.look(PROXY, REPLICA)
    assert table.asked == 1
    table.look(PROXY, REPLICA, starting="SERVE_REPLICA::isotherm#ingress#y8")
    table.look(PROXY, REPLICA, starting="SERVE_REPLICA::isotherm#ingress#y8")
    assert table.asked == 3, "until it lives: its loss would be one"


def test_one_look_at_a_time_says_what_there_is(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    looks = iter([[PROXY], [gone(PROXY)]])
    there = iter([frozenset({PROXY.name}), frozenset[str]()])
    monkeypatch.setattr(front_door_losses, "front_door_actors", lambda: next(looks))
    monkeypatch.setattr(front_door_losses, "front_door_names", lambda: next(there))
    watch = FrontDoorWatch(said.append, list)
    for _ in range(2):
        watch.look()
        assert watch._looking.acquire(timeout=10)
        watch._looking.release()
    assert said == [PROXY_LOST]
