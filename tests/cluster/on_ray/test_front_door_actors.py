"""Which of the actors that Ray knows are the front door, and how each has ended; without a Ray."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDeathCause

from isotherm.cluster.on_ray import front_door_actors as on_ray

PROXY, REPLICA = "SERVE_PROXY_ACTOR-0a", "SERVE_REPLICA::isotherm#ingress#x7"
OTHERS = "SERVE_REPLICA::another#ingress#y8", "SERVE_CONTROLLER_ACTOR", "expert-0"


def died(reason: str) -> ActorDeathCause:
    cause = ActorDeathCause()
    cause.actor_died_error_context.reason = cause.actor_died_error_context.Reason.Value(reason)
    return cause


def out_of_memory() -> ActorDeathCause:
    cause = ActorDeathCause()
    cause.oom_context.error_message = "too much"
    return cause


@pytest.mark.parametrize(
    ("state", "cause", "crashed"),
    [("ALIVE", ActorDeathCause(), False), ("PENDING_CREATION", ActorDeathCause(), False),
     ("DEAD", died("WORKER_DIED"), True), ("DEAD", died("NODE_DIED"), True), ("DEAD", out_of_memory(), True),
     ("DEAD", died("RAY_KILL"), False), ("DEAD", died("OUT_OF_SCOPE"), False), ("DEAD", ActorDeathCause(), False)],
)  # fmt: skip
def test_what_ended_by_itself_has_crashed(monkeypatch, state: str, cause: ActorDeathCause, crashed: bool):
    table = {name: {"Name": name, "Pid": 7, "State": state, "DeathCause": cause} for name in (PROXY, REPLICA, *OTHERS)}
    monkeypatch.setattr(on_ray, "actors", lambda: table)
    proxy, replica = on_ray.front_door_actors()
    assert (proxy.words, replica.words) == ("HTTP proxy (process 7)", "ingress replica ingress-x7 (process 7)")
    assert [(one.alive, one.crashed) for one in (proxy, replica)] == [(state == "ALIVE", crashed)] * 2


def test_the_names_are_those_of_proxies_and_of_the_ingress(monkeypatch):
    named = [{"name": name, "namespace": "serve"} for name in (PROXY, REPLICA, *OTHERS)]
    named.append({"name": PROXY, "namespace": "somebody's"})
    monkeypatch.setattr(on_ray, "list_named_actors", lambda all_namespaces: named)
    assert on_ray.front_door_names() == {PROXY, REPLICA}
