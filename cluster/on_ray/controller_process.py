"""The controller's process as Ray knows it: where it is put, how it is found, and how one that hangs is replaced."""

from __future__ import annotations

import asyncio

import ray
from ray._private.state import actors
from ray.experimental.internal_kv import _internal_kv_put

from isotherm.cluster.on_ray.handles import ActorHandle
from isotherm.cluster.on_ray.workers import NAMESPACE

CONTROLLER = "isotherm-controller"
# Begins the keys, in Ray's key-value store, of those who have a controller killed that hangs.
HANGS = "controller-hangs/"
# What Ray's head node has alone. Controller and ingress are put there: when it is lost so is the Ray cluster, and every
# other node can be drained.
ON_HEAD = {"node:__internal_head__": 0.001}


def find_controller() -> ActorHandle:
    """Raises ValueError when no controller runs on this Ray cluster."""
    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


class ControllerProcess:
    """`Watched` of cluster/control/liveness.py. What asks Ray's head does so in a thread: where the head is away, such
    a call blocks."""

    async def incarnation(self) -> str | None:
        return await asyncio.to_thread(self._incarnation)

    def _incarnation(self) -> str | None:
        try:
            actor_id = find_controller()._actor_id.hex()
        except ValueError:
            return None
        entry = actors(actor_id)
        return f"{actor_id}/{entry['NumRestarts']}" if entry.get("State") == "ALIVE" else None

    async def answer(self) -> None:
        controller = await asyncio.to_thread(find_controller)
        await controller.answer.remote()

    async def claim(self, incarnation: str, attempt: int) -> bool:
        key = f"{HANGS}{incarnation}/{attempt}".encode()
        existed = await asyncio.to_thread(_internal_kv_put, key, b"", overwrite=False, namespace=NAMESPACE.encode())
        return not existed

    async def kill(self) -> None:
        await asyncio.to_thread(lambda: ray.kill(find_controller(), no_restart=False))
