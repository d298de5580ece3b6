"""What ingress replicas ask of the controller and of shards, over Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from ray.exceptions import RayError, RayTaskError

from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON, JSONValue
from isotherm.cluster.messages.feed import FeedPart
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.membership import Membership, WorkerGoneError
from isotherm.cluster.messages.requests import Delta, GenerationRequest
from isotherm.cluster.on_ray.controller_process import find_controller
from isotherm.cluster.on_ray.handles import ActorHandle
from isotherm.cluster.on_ray.workers import find_worker

_LOOKED_UP = RayError, ValueError  # what a call raises that looks for an actor: a ValueError where Ray knows none


@contextlib.contextmanager
def _errors_of_ours(words: str = "", gone: tuple[type[Exception], ...] = (RayError,)) -> Iterator[None]:
    """Raises what the actor has raised; where there is none, WorkerGoneError, which begins with `words`."""
    try:
        yield
    except RayTaskError as error:  # it lives, and says no: for instance by OperationError or PlacementChangeError
        raise error.cause from None
    except gone as error:
        raise WorkerGoneError(words + one_line(error)) from None


class RayShard:
    """`Shard` of cluster/routing/connection.py."""

    def __init__(self, actor: ActorHandle):
        self._actor = actor

    async def stream(self, connection: str) -> AsyncGenerator[list[Delta], None]:
        with _errors_of_ours():
            async for item in self._actor.stream.options(num_returns="streaming").remote(connection):
                yield await item

    async def submit(self, connection: str, requests: list[GenerationRequest], aborts: list[str]) -> None:
        with _errors_of_ours():
            await self._actor.submit.remote(connection, requests, aborts)

    async def held_up(self, seconds: float) -> str:
        with _errors_of_ours():
            said: str = await self._actor.held_up.remote(seconds)
            return said


class ControllerClient:
    """`Cluster` of cluster/routing/shard_client.py, AdminClient of cluster/api/admin.py, and `Others` of
    cluster/observe/ingress.py. Actors are looked up in a thread: that call blocks."""

    async def watch(self, known_version: int) -> Membership:
        membership: Membership = await self._ask("watch", known_version)
        return membership

    async def shard(self, name: str) -> RayShard:
        with _errors_of_ours(gone=_LOOKED_UP):
            return RayShard(await asyncio.to_thread(find_worker, name))

    async def status(self) -> JSON:
        status: JSON = await self._ask("status")
        return status

    async def operate(self, body: JSONValue) -> JSON:
        operation: JSON = await self._ask("operate", body)
        return operation

    async def operation(self, operation_id: str) -> JSON | None:
        operation: JSON | None = await self._ask("operation", operation_id)
        return operation

    async def operation_history(self) -> list[JSON]:
        operations: list[JSON] = await self._ask("operation_history")
        return operations

    async def experts(self) -> JSON:
        experts: JSON = await self._ask("experts")
        return experts

    async def autoscaler(self) -> JSON:
        autoscaler: JSON = await self._ask("autoscaler")
        return autoscaler

    async def set_autoscaler(self, body: JSONValue) -> JSON:
        autoscaler: JSON = await self._ask("set_autoscaler", body)
        return autoscaler

    async def feed_part(self, last: str) -> FeedPart | None:
        part: FeedPart | None = await self._ask("feed_part", last)
        return part

    async def report(self, ingress: str, figures: Figures, requests: JSON) -> None:
        await self._ask("report", ingress, figures, requests)

    async def metrics(self, ingress: str, figures: Figures) -> str:
        text: str = await self._ask("metrics", ingress, figures)
        return text

    async def requests(self) -> dict[str, JSON]:
        requests: dict[str, JSON] = await self._ask("requests")
        return requests

    async def _ask(self, name: str, *args: Any) -> Any:
        """Raises WorkerGoneError while there is no controller, and what the controller raises."""
        with _errors_of_ours("the controller cannot be reached: ", _LOOKED_UP):
            controller = await asyncio.to_thread(find_controller)
            return await getattr(controller, name).remote(*args)
