"""Every Ray call that starts, finds or ends a worker: a detached placement group of one bundle with one detached actor
in it."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

import ray
from ray import PlacementGroupID
from ray._private.state import actors
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.workers import ROLES
from isotherm.cluster.on_ray.handles import ActorHandle

NAMESPACE = "isotherm"


@dataclass(frozen=True)
class Slot:
    """A placement group that Ray has placed."""

    placement_group: PlacementGroup
    node_id: str
    host: str  # IP address of the node


@dataclass(frozen=True)
class RayWorker:
    """A started worker actor. Of one that was gone when it was looked for there is no actor, and maybe no slot."""

    id: str
    slot: Slot | None
    actor: ActorHandle

    async def call(self, name: str, *args: Any) -> Any:
        """What one of the actor's methods gives. Raises WorkerGoneError."""
        if self.actor is None:
            raise WorkerGoneError(f"{self.id} is gone")
        try:
            return await getattr(self.actor, name).remote(*args)
        except RayActorError as error:
            raise WorkerGoneError(one_line(error)) from None

    @property
    def node_id(self) -> str | None:
        return None if self.slot is None else self.slot.node_id

    @property
    def placement_group_id(self) -> str | None:
        return None if self.slot is None else self.slot.placement_group.id.hex()


def is_loss(error: Exception) -> bool:
    """Whether it says that a worker is gone which had been made: killed, and not for an error of its own."""
    return isinstance(error, WorkerGoneError) or (isinstance(error, RayActorError) and not error.actor_init_failed)


def _slot(placed: PlacementGroup, entry: JSON) -> Slot:
    node_id = entry["bundles_to_node_id"][0]
    return Slot(placed, node_id, next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id))


async def reserve(name: str, bundle: dict[str, float], labels: dict[str, str] | None = None) -> Slot:
    """Wait until Ray has placed a bundle of resources, on a node whose labels match the selectors in `labels`. A bundle
    of nothing still gets a node."""
    # Ray refuses a bundle without any resource.
    resources = [bundle or {"CPU": 0.001}]
    placed = placement_group(
        resources, strategy="PACK", name=name, lifetime="detached", bundle_label_selector=[labels] if labels else None
    )
    try:
        await placed.ready()
        return _slot(placed, placement_group_table(placed))
    except BaseException:  # also where its node has died in that instant
        remove_placement_group(placed)
        raise


def release_slot(slot: Slot) -> None:
    """Give back one that no worker was started in."""
    remove_placement_group(slot.placement_group)


def start_worker(worker_id: str, slot: Slot, bundle: dict[str, float], cls: type, *args: Any) -> RayWorker:
    """Start `cls(*args)` as a named detached actor that takes the whole slot, which is given back where Ray refuses. It
    is never restarted: it would come back empty."""
    options: dict[str, Any] = {
        "name": worker_id,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "memory": bundle.get("memory") or None,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(slot.placement_group, placement_group_bundle_index=0),
    }
    try:
        return RayWorker(worker_id, slot, ray.remote(cls).options(**options).remote(*args))
    except BaseException:
        release_slot(slot)
        raise


def end_worker(worker: RayWorker) -> None:
    """Kill the actor and give its resources back."""
    if worker.actor is not None:
        ray.kill(worker.actor)
    if worker.slot is not None:
        remove_placement_group(worker.slot.placement_group)


def pid_of_worker(name: str) -> int | None:
    """Of the newest worker with this name, also where it is gone; None where Ray knows none."""
    found = [entry for entry in actors().values() if entry["Name"] == name]
    newest = max(found, key=lambda entry: float(entry["StartTime"]), default=None)
    return None if newest is None else newest["Pid"] or None


def find_workers(prefix: str) -> dict[str, RayWorker]:
    """The live workers by name; `prefix` is what their placement groups' names begin with. Placement groups without an
    actor, which somebody left, are removed."""
    pattern = rf"({'|'.join(ROLES)})-\d+"
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [a["name"] for a in named if a["namespace"] == NAMESPACE and re.fullmatch(pattern, a["name"])]
    slots = {}
    for id_, entry in placement_group_table().items():
        if entry["name"].startswith(prefix) and entry["state"] != "REMOVED":
            placed = PlacementGroup(PlacementGroupID(bytes.fromhex(id_)))
            name = entry["name"].removeprefix(prefix)
            if name in names and entry["state"] == "CREATED":
                slots[name] = _slot(placed, entry)
            else:
                remove_placement_group(placed)
    found = {}
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            found[name] = RayWorker(name, slots.get(name), find_worker(name))
    return found


def find_worker(worker_id: str) -> ActorHandle:
    """The actor of a worker, from any process of the cluster."""
    return ray.get_actor(worker_id, namespace=NAMESPACE)
