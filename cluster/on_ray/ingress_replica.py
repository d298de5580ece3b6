"""An ingress replica as the controller reaches it over Ray: by Ray Serve's own actor."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from isotherm.cluster.errors import one_line
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.on_ray.handles import ActorHandle

# ray/serve/_private/constants.py, and ReplicaID.to_full_id_str of ray/serve/_private/common.py
NAMESPACE, PREFIX = "serve", "SERVE_REPLICA::"


class IngressReplica:
    """`Replica` of cluster/control/ingress_watch.py. `name`: ingress-ID, with Ray Serve's id."""

    def __init__(self, name: str) -> None:
        self._id = name.partition("-")[2]
        self._actor: ActorHandle | None = None

    async def reach(self) -> None:
        self._actor = await asyncio.to_thread(self._find)

    async def answer(self) -> None:
        await self._call("was_initialized")  # on the event loop that serves requests

    async def stir(self) -> None:
        await self._call("get_num_ongoing_requests")  # in a thread beside it

    async def kill(self) -> None:
        await asyncio.to_thread(lambda: ray.kill(self._reached()))

    async def _call(self, method: str) -> Any:
        try:
            return await getattr(self._reached(), method).remote()
        except RayError as error:
            raise WorkerGoneError(one_line(error)) from None

    def _reached(self) -> ActorHandle:
        assert self._actor is not None, "reach comes first"
        return self._actor

    def _find(self) -> ActorHandle:
        try:
            for actor in list_named_actors(all_namespaces=True):
                name = actor["name"]
                if actor["namespace"] == NAMESPACE and name.startswith(PREFIX) and name.endswith(f"#{self._id}"):
                    return ray.get_actor(name, namespace=NAMESPACE)
        except (ValueError, RayError) as error:
            raise WorkerGoneError(one_line(error)) from None
        raise WorkerGoneError(f"Ray knows no replica {self._id}")
