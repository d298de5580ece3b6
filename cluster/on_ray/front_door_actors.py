"""The actors of Ray Serve that are the front door, as Ray's own table has them: its proxies, and the replicas of the
ingress."""

from __future__ import annotations

from dataclasses import dataclass

from ray._private.state import actors
from ray.util import list_named_actors

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.on_ray.ingress_replica import NAMESPACE, PREFIX

PROXY = "SERVE_PROXY_ACTOR-"  # ray/serve/_private/constants.py
_REPLICA = f"{PREFIX}isotherm#ingress#"  # by the names of application and deployment
_CRASHES = ("WORKER_DIED", "NODE_DIED")  # what Serve itself ends is RAY_KILL


@dataclass(frozen=True)
class FrontDoorActor:
    """`name`: Ray's, which a proxy has in common with those that were there before it. `crashed`: it has ended, and not
    because Serve, or whoever else knows of it, wanted it to."""

    id: str
    name: str
    pid: int
    alive: bool
    crashed: bool

    @property
    def is_proxy(self) -> bool:
        return self.name.startswith(PROXY)

    @property
    def ingress(self) -> str:
        """The name by which an ingress replica reports."""
        return f"ingress-{self.name.rpartition('#')[2]}"

    @property
    def words(self) -> str:
        """As logs and metrics call it."""
        called = "HTTP proxy" if self.is_proxy else f"ingress replica {self.ingress}"
        return f"{called} (process {self.pid})"


def front_door_names() -> frozenset[str]:
    """Of those that live or are being started."""
    there = list_named_actors(all_namespaces=True)
    return frozenset(actor["name"] for actor in there if _is_front_door(actor["namespace"], actor["name"]))


def front_door_actors() -> list[FrontDoorActor]:
    """Those that have ended too, as far as Ray remembers them."""
    return [
        FrontDoorActor(id_, entry["Name"], entry["Pid"], entry["State"] == "ALIVE", _crashed(entry))
        for id_, entry in actors().items()
        if _is_front_door(NAMESPACE, entry["Name"])
    ]


def _is_front_door(namespace: str, name: str) -> bool:
    return namespace == NAMESPACE and name.startswith((PROXY, _REPLICA))


def _crashed(entry: JSON) -> bool:
    if entry["State"] != "DEAD":
        return False
    cause = entry["DeathCause"]
    died = cause.actor_died_error_context
    return cause.HasField("oom_context") or died.Reason.Name(died.reason) in _CRASHES
