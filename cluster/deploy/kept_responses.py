"""Where several ingress replicas keep responses: in one actor for all of them, so that a request may go on at any
replica from what another one has answered."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import RayError

from isotherm.cluster.api.errors import unavailable
from isotherm.cluster.api.response_store import Kept, MemoryResponseStore
from isotherm.cluster.errors import one_line
from isotherm.cluster.on_ray.controller_process import ON_HEAD
from isotherm.cluster.on_ray.handles import ActorHandle
from isotherm.cluster.on_ray.workers import NAMESPACE

log = logging.getLogger(__name__)
_NAME = "isotherm-kept-responses"
_SECONDS = 5.0  # for one call; it takes a millisecond or two


class SharedResponseStore:
    """`ResponseStore` of cluster/api/response_store.py. The actor is started by whoever needs it first; where it dies
    its responses are forgotten, and it is started again."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def put(self, owner: str, kept: Kept) -> None:
        """Without the actor the response is still answered, and cannot be gone on from."""
        try:
            self._ask("put", owner, kept)
        except RayError as error:
            log.warning("response %s could not be kept: %s", kept.response_id, one_line(error))

    def get(self, owner: str, response_id: str) -> Kept | None:
        kept: Kept | None = self._answer("get", owner, response_id)
        return kept

    def delete(self, owner: str, response_id: str) -> bool:
        deleted: bool = self._answer("delete", owner, response_id)
        return deleted

    def _answer(self, name: str, *args: object) -> Any:
        """Raises ReplyError 503 where the actor cannot be asked: whether a response is kept is not known then."""
        try:
            return self._ask(name, *args)
        except RayError as error:
            raise unavailable(f"kept responses cannot be reached: {one_line(error)}") from None

    def _ask(self, name: str, *args: object) -> Any:
        options = {"name": _NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        places = {"num_cpus": 0, "resources": ON_HEAD, "max_restarts": -1}
        actor: ActorHandle = ray.remote(MemoryResponseStore).options(**options, **places).remote(self._max_bytes)
        return ray.get(getattr(actor, name).remote(*args), timeout=_SECONDS)


def forget_responses() -> None:
    """End the actor, if there is one."""
    try:
        actor = ray.get_actor(_NAME, namespace=NAMESPACE)
    except ValueError:
        return
    ray.kill(actor)
