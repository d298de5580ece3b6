"""The engine as an ingress replica sees it: attention shards behind Ray actors, one stream of deltas from each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError, RayTaskError

from isotherm.cluster.engine_client import EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.liveness import watch_controller
from isotherm.cluster.membership import Membership
from isotherm.cluster.ray_workers import ControllerProcess, find_controller, find_worker
from isotherm.cluster.requests import Delta, FinishReason, GenerationRequest

log = logging.getLogger(__name__)
ADMISSION_SECONDS = 60.0  # how long a request without a token waits while every shard is lost
RESUBMIT_SECONDS = 120.0  # how long a stream that has begun waits for a shard to go on at
PING_PERIOD = 5.0  # seconds between signs of life; shards give up on an ingress replica that is silent for several of these


@dataclass
class _Shard:
    """A shard that this replica is connected to."""

    name: str
    actor: Any
    connection: str  # this replica's name at the shard, fresh for every connection
    streams: dict[str, asyncio.Queue[Delta]] = field(default_factory=dict)  # open requests
    requests: list[GenerationRequest] = field(default_factory=list)  # to be sent
    aborts: list[str] = field(default_factory=list)  # to be sent
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class ShardClient:
    """EngineClient over the shards that the controller names. Start it with `start` on the event loop that uses it."""

    def __init__(self, vocab_size: int, max_model_len: int, liveness: float = 0.0, shard_capacity: int = sys.maxsize):
        """`liveness`: seconds of silence after which the controller counts as hung; 0: never. `shard_capacity`: requests that each shard takes."""
        self._shard_capacity = shard_capacity
        self.vocab_size, self.max_model_len, self._liveness = vocab_size, max_model_len, liveness
        self._shards: dict[str, _Shard] = {}
        self._draining: list[_Shard] = []
        self._membership: Membership | None = None
        self._not_ready: str | None = "the controller has not been found yet"
        self._tasks: set[asyncio.Task] = set()

    def start(self) -> None:
        self._spawn(self._follow_membership())
        if self._liveness:
            self._spawn(watch_controller(ControllerProcess(), self._liveness))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- EngineClient ----------------------------------------------------------------------------------------------------------------

    def not_ready(self) -> str | None:
        return self._not_ready

    def capacity(self) -> int:
        return self._shard_capacity * max(1, len(self._shards))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """As EngineClient says. A request whose shard is lost or drained goes on at another, from the tokens that were already given out."""
        sent = list(request.generated)
        shard = await self._choose_within(ADMISSION_SECONDS) if self._will_serve() else self._choose()
        attempt = request
        while True:
            async with aclosing(self._attempt(shard, attempt)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is FinishReason.MOVED:
                        break
                    if delta.finish_reason is FinishReason.REFUSED:
                        raise EngineOverloadedError(delta.error)
                    if delta.token_ids and delta.start != len(sent):
                        raise RuntimeError(f"{shard.name} sent token {delta.start} of request {request.id} where {len(sent)} was due")
                    sent += delta.token_ids
                    yield delta
                    if delta.finish_reason is not None:
                        return
            log.info("request %s goes on elsewhere after %d tokens", request.id, len(sent))
            attempt = request.resumed(tuple(sent))
            if len(sent) == len(request.generated):
                shard = await self._choose_within(ADMISSION_SECONDS)
                continue
            try:
                shard = await self._choose_within(RESUBMIT_SECONDS)
            except EngineUnavailableError as error:
                yield Delta(request.id, len(sent), finish_reason=FinishReason.ERROR, error=f"its attention shard was lost, and {error}")
                return

    async def _attempt(self, shard: _Shard, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """The request's deltas from one shard. Left early, it is aborted there."""
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        shard.streams[request.id] = queue
        shard.requests.append(request)
        shard.wake.set()
        finished = False
        try:
            while not finished:
                delta = await queue.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            shard.streams.pop(request.id, None)
            if not finished:
                shard.aborts.append(request.id)
                shard.wake.set()

    async def status(self) -> dict[str, Any]:
        return await find_controller().status.remote()

    # --- AdminClient -----------------------------------------------------------------------------------------------------------------

    async def operate(self, body: Any) -> dict[str, Any]:
        try:
            return await find_controller().operate.remote(body)
        except RayTaskError as error:
            raise error.cause from None  # OperationError or PlacementChangeError, as the controller raised it

    async def operation(self, operation_id: str) -> dict[str, Any] | None:
        return await find_controller().operation.remote(operation_id)

    async def operation_history(self) -> list[dict[str, Any]]:
        return await find_controller().operation_history.remote()

    async def experts(self) -> dict[str, Any]:
        return await find_controller().experts.remote()

    async def autoscaler(self) -> dict[str, Any]:
        return await find_controller().autoscaler.remote()

    async def metrics(self) -> str:
        return await find_controller().metrics.remote()

    # --- shards ----------------------------------------------------------------------------------------------------------------------

    def _choose(self) -> _Shard:
        if self._not_ready is not None or not self._shards:
            raise EngineUnavailableError(self._not_ready or "no attention shard serves")
        return min(self._shards.values(), key=lambda s: len(s.streams))

    def _will_serve(self) -> bool:
        """Whether waiting for a shard is worth it: the cluster serves, or has lost every shard and replaces them. Where it serves there may be none
        either, for a moment: a shard can be gone before the controller has said so."""
        return self._membership is not None and (self._membership.recovering or self._membership.not_ready is None)

    async def _choose_within(self, seconds: float) -> _Shard:
        """Like `_choose`, but waits for a shard. Raises EngineUnavailableError when the time is over."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                return self._choose()
            except EngineUnavailableError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(0.05)

    async def _follow_membership(self) -> None:
        version = 0
        while True:
            try:
                membership = await find_controller().watch.remote(version)
            except (RayError, ValueError) as error:  # ValueError: Ray knows no such actor
                log.warning("no controller: %s", _first_line(error))
                if self._membership is None:
                    self._not_ready = "the controller has not been found yet"
                await asyncio.sleep(0.5)
                continue
            if membership.version > version:
                version = membership.version
                self._adopt(membership)

    def _adopt(self, membership: Membership) -> None:
        self._membership, self._not_ready = membership, membership.not_ready
        self.max_model_len = membership.max_model_len
        for name in membership.shards:
            if name not in self._shards:
                shard = _Shard(name, find_worker(name), uuid.uuid4().hex)
                self._shards[name] = shard
                self._spawn(self._listen(shard))
                self._spawn(self._send(shard))
        for name in [n for n in self._shards if n not in membership.shards]:
            # It takes no new requests; those that it has, it finishes, or gives back when its time is over.
            self._draining.append(self._shards.pop(name))

    async def _listen(self, shard: _Shard) -> None:
        """Hand each delta to its request, as long as the shard lives."""
        try:
            async for item in shard.actor.stream.options(num_returns="streaming").remote(shard.connection):
                for delta in await item:
                    if (queue := shard.streams.get(delta.request_id)) is not None:
                        queue.put_nowait(delta)
            reason = "closed its stream"
        except RayError as error:
            reason = f"was lost: {_first_line(error)}"
        self._drop(shard, reason)

    async def _send(self, shard: _Shard) -> None:
        """Send new requests and aborts, in one call all that came since the last, and a sign of life now and then.

        Never from the task of an HTTP request: when a client goes away Serve cancels that task together with the Ray calls it has made, so an
        abort sent from there would be lost.
        """
        while self._shards.get(shard.name) is shard or shard in self._draining:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(shard.wake.wait(), PING_PERIOD)
            shard.wake.clear()
            requests, shard.requests = shard.requests, []
            aborts, shard.aborts = shard.aborts, []
            try:
                await shard.actor.submit.remote(shard.connection, requests, aborts)
            except RayError as error:
                self._drop(shard, f"cannot be reached: {_first_line(error)}")

    def _drop(self, shard: _Shard, reason: str) -> None:
        """Take a lost shard out of service; its requests go elsewhere."""
        if shard in self._draining:
            self._draining.remove(shard)
        elif self._shards.get(shard.name) is shard:
            del self._shards[shard.name]
            log.warning("attention shard %s %s", shard.name, reason)
        shard.wake.set()  # lets its sender end
        for request_id, queue in shard.streams.items():
            queue.put_nowait(Delta(request_id, 0, finish_reason=FinishReason.MOVED))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
