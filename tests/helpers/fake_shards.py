"""Attention shards, and the controller that names them, without Ray: as `ShardClient` sees them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from virtual_time import run_in_virtual_time

from isotherm.cluster.messages.membership import Membership, ShardLimits, WorkerGoneError
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams
from isotherm.cluster.routing.shard_client import ShardClient

_T = TypeVar("_T")


class UnknownConnection(ConnectionError):
    pass


class FakeShard:
    """Gives request r the tokens 100, 101, …, one at each `tick`; the one named "poison" kills it when it is
    computed, the one named "instant poison" before its submit is acknowledged."""

    def __init__(self, name: str):
        self.name = name
        self.lists: dict[str, asyncio.Queue[Any]] = {}  # by connection; None ends the stream, an exception is raised
        self.running: dict[str, tuple[str, GenerationRequest, int]] = {}  # by id: connection, request, tokens so far
        self.submitted: list[tuple[str, ...]] = []
        self.aborted: list[str] = []
        self.dead = False
        self.parted = False  # it lives, and neither hears anything nor can be heard
        self.stands = ""  # why its requests do not get on
        self.room: int | None = None  # new requests beyond it are refused

    async def stream(self, connection: str) -> AsyncGenerator[list[Delta], None]:
        if self.parted:
            await asyncio.Event().wait()
        lists = self.lists[connection] = asyncio.Queue()
        yield []
        while (item := await lists.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    async def submit(self, connection: str, requests: list[GenerationRequest], aborts: list[str]) -> None:
        if any(request.id == "instant poison" for request in requests):
            self.die()
        if self.dead:
            raise WorkerGoneError(f"{self.name} is dead")
        while self.parted:
            await asyncio.sleep(0.05)
        if connection not in self.lists:
            raise UnknownConnection(connection)
        if requests:
            self.submitted.append(tuple(r.id for r in requests))
        for request in requests:
            if self.room is not None and len(self.running) >= self.room and not request.accepted:
                refused = Delta(request.id, 0, finish_reason=FinishReason.REFUSED, error="full")
                self.lists[connection].put_nowait([refused])
                continue
            self.running[request.id] = connection, request, len(request.generated)
        for request_id in aborts:
            self.aborted.append(request_id)
            self.running.pop(request_id, None)

    async def held_up(self, seconds: float) -> str:
        if self.dead:
            raise WorkerGoneError(f"{self.name} is dead")
        if self.stands == "without a word":
            await asyncio.Event().wait()
        await asyncio.sleep(seconds if self.stands else 0.0)
        return self.stands

    def tick(self) -> None:
        """One step."""
        if self.parted:
            return
        if "poison" in self.running:
            self.die()
            return
        deltas: dict[str, list[Delta]] = {}
        for request_id, (connection, request, at) in list(self.running.items()):
            last = at + 1 >= request.params.max_tokens
            delta = Delta(request_id, at, (100 + at,), FinishReason.LENGTH if last else None)
            deltas.setdefault(connection, []).append(delta)
            self.running[request_id] = connection, request, at + 1
            if last:
                del self.running[request_id]
        for connection, mine in deltas.items():
            if connection in self.lists:
                self.lists[connection].put_nowait(mine)

    def die(self) -> None:
        self.dead = True
        self.running.clear()
        for lists in self.lists.values():
            lists.put_nowait(WorkerGoneError(f"{self.name} was killed"))

    def close_streams(self) -> None:
        """As where the replica was silent for too long."""
        self.running.clear()
        for lists in self.lists.values():
            lists.put_nowait(None)
        self.lists.clear()


class FakeCluster:
    """Replaces a dead shard by a new one, as the controller does; `replacing` False: never."""

    def __init__(self, shards: int, replacing: bool = True):
        self.shards = {f"attention-{i}": FakeShard(f"attention-{i}") for i in range(shards)}
        self.replacing = replacing
        self.lost = 0
        self.named = tuple(self.shards)
        self.limits = ShardLimits(4096)
        self.version = 1
        self.changed = asyncio.Event()

    def publish(self, *named: str) -> None:
        self.named, self.version = named, self.version + 1
        self.changed.set()
        self.changed = asyncio.Event()

    async def watch(self, known_version: int) -> Membership:
        if self.version <= known_version:
            await self.changed.wait()
        return Membership(
            self.version, self.named, None if self.named else "none is left", self.limits, recovering=not self.named
        )

    async def shard(self, name: str) -> FakeShard:
        if name not in self.shards or self.shards[name].dead:
            raise WorkerGoneError(f"Ray knows no {name}")
        return self.shards[name]

    async def status(self) -> dict[str, Any]:
        return {}

    def replace_the_dead(self) -> None:
        dead = [s for s in self.shards.values() if s.dead]
        self.lost += len(dead)
        for shard in dead if self.replacing else []:
            del self.shards[shard.name]
            name = f"attention-{uuid.uuid4().hex[:6]}"
            self.shards[name] = FakeShard(name)
        if dead:
            self.publish(*(name for name, shard in self.shards.items() if not shard.dead))


def request(name: str, tokens: int = 6) -> GenerationRequest:
    return GenerationRequest(name, (1, 2, 3), SamplingParams(tokens))


async def collect(client: ShardClient, asked: GenerationRequest) -> list[Delta]:
    return [delta async for delta in client.generate(asked)]


EXPECTED = [100, 101, 102, 103, 104, 105]  # of a request for six tokens


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def play(cluster: Callable[[], FakeCluster], act: Callable[[FakeCluster, ShardClient], Awaitable[_T]]) -> _T:
    """`act` on this cluster, with a client that is ready; what it gives."""
    return _played(cluster, lambda client: client.not_ready() is None, act)


def play_with_room(shards: int, limits: ShardLimits, act: Callable[[FakeCluster, ShardClient], Awaitable[_T]]) -> _T:
    """`act` on so many shards of these limits, with a client that is connected to all of them; what it gives."""

    def cluster() -> FakeCluster:
        made = FakeCluster(shards)
        made.limits = limits
        return made

    return _played(cluster, lambda client: len(client._serving()) == shards, act)


def _played(
    cluster: Callable[[], FakeCluster],
    begins: Callable[[ShardClient], bool],
    act: Callable[[FakeCluster, ShardClient], Awaitable[_T]],
) -> _T:
    async def go() -> _T:
        made = cluster()
        client = ShardClient(made, 300, made.limits)
        client.start()
        while not begins(client):
            await asyncio.sleep(0.001)
        try:
            return await asyncio.wait_for(act(made, client), 20)
        finally:
            await client.background.close()

    return run_in_virtual_time(go())


async def run_until(
    cluster: FakeCluster, work: list[asyncio.Task[Any]], event: Callable[[int], None] = lambda step: None
) -> None:
    """Steps of every shard until the work is done."""
    step = 0
    while not all(task.done() for task in work):
        for shard in list(cluster.shards.values()):
            if not shard.dead:
                shard.tick()
        event(step)
        cluster.replace_the_dead()
        step += 1
        await asyncio.sleep(0.005)


def ask(client: ShardClient, *requests: GenerationRequest) -> list[asyncio.Task[list[Delta]]]:
    return [asyncio.ensure_future(collect(client, asked)) for asked in requests]
