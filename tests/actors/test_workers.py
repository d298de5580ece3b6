"""The two actors as plain objects in this process: a shard and a group over a real link, and what they say when it
fails or a thread hangs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import pytest
from loaded_model import alone

from isotherm.actors.attention.delivery import UnknownConnectionError
from isotherm.actors.attention.shard import AttentionShard
from isotherm.actors.experts.group import ExpertGroup
from isotherm.actors.links.process_group import Rendezvous
from isotherm.actors.links.protocol import LinkError
from isotherm.cluster.engine.scheduler import SchedulerConfig
from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.messages.requests import Delta, GenerationRequest, SamplingParams
from isotherm.cluster.messages.workers import Meeting, WorkerSpec
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.placement.table import contiguous_placement

SCHEDULER = SchedulerConfig(16, 256, 512, 8, 1024)
REQUEST = GenerationRequest("r", tuple(range(10, 60)), SamplingParams(40, temperature=1.0, seed=3))


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # what a worker sets for its process


class Workers:
    """A loaded shard and a loaded group, linked."""

    def __init__(self, kind: str):
        self.kind = kind
        self.rendezvous = Rendezvous("127.0.0.1")
        spec = WorkerSpec(
            "worker", bundled_model(), "cpu", "bfloat16", "stored", "auto", 1, link_timeout=20.0, gather_window=1.0
        )
        self.shard = AttentionShard(spec, "127.0.0.1", SCHEDULER)
        config = self.shard.checkpoint.config
        self.placement = contiguous_placement(config.moe_layers, config.n_routed_experts, ["expert-0"])
        self.group = ExpertGroup(spec, "127.0.0.1", len(config.moe_layers) * config.n_routed_experts)
        self.got: list[Delta] = []

    async def link(self) -> None:
        prefix = uuid.uuid4().hex
        meeting = Meeting(self.rendezvous.host, self.rendezvous.port, prefix, 20.0, self.kind)  # type: ignore[arg-type]
        await asyncio.gather(self.shard.connect("expert-0", meeting), self.group.connect("attention-0", meeting))

    async def start(self) -> None:
        await asyncio.gather(self.shard.load(), self.group.load(self.placement.held_by("expert-0")))
        await self.link()
        assert await self.shard.adopt(self.placement) == 1
        self.reader = asyncio.ensure_future(self._read())
        await asyncio.sleep(0.05)

    async def _read(self) -> None:
        async for deltas in self.shard.stream("replica"):
            self.got += deltas

    async def finished(self) -> list[int]:
        while not self.got or self.got[-1].finish_reason is None:
            await asyncio.sleep(0.01)
        return [token for delta in self.got for token in delta.token_ids]


def play(kind: str, act: Callable[[Workers], Awaitable[None]]) -> None:
    async def go() -> None:
        workers = Workers(kind)
        await workers.start()
        await asyncio.wait_for(act(workers), 60)
        workers.reader.cancel()

    asyncio.run(go())


KINDS = ["shared-memory", "process-group"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_over_a_new_link(kind: str):
    """One data socket is reset: the shard says so, the controller makes another, and not a token changes."""

    async def act(workers: Workers) -> None:
        shard = workers.shard
        link = shard._links["expert-0"]
        receive, calls = link.receive, []

        def fail_once():
            calls.append(True)
            if len(calls) == 100:
                raise LinkError("connection reset")
            return receive()

        link.receive = fail_once  # type: ignore[method-assign]
        version, failed = await shard.failed_links(-1)
        assert failed == {}
        await shard.submit("replica", [REQUEST], [])
        version, failed = await shard.failed_links(version)
        assert failed == {"expert-0": "connection reset"} == (await shard.status())["failed_links"]
        await shard.sign_of_life()  # its thread waits for the link, and is well
        assert len(calls) == 100
        await workers.link()
        version, failed = await shard.failed_links(version)
        assert failed == {}
        assert await workers.finished() == alone(REQUEST)

    play(kind, act)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_whose_thread_hangs_gives_no_sign_of_life(kind: str):
    async def act(workers: Workers) -> None:
        shard, group = workers.shard, workers.group
        await asyncio.gather(shard.sign_of_life(), group.sign_of_life())  # both rest
        with group.worker.gate:  # the computing thread cannot go on, the event loop can
            await shard.submit("replica", [REQUEST], [])
            while (await shard.waits_for())[0] != "expert-0":
                await asyncio.sleep(0.01)
            for worker in (shard, group):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(worker.sign_of_life(), 1.0)
        assert await workers.finished() == alone(REQUEST)
        assert await shard.waits_for() == ("", 0.0)
        await asyncio.gather(shard.sign_of_life(), group.sign_of_life())

    play(kind, act)


def test_requests_come_over_open_connections_only():
    async def act(workers: Workers) -> None:
        with pytest.raises(UnknownConnectionError):
            await workers.shard.submit("another", [REQUEST], [])
        await workers.shard.submit("replica", [REQUEST], [])
        assert await workers.finished() == alone(REQUEST)

    play("shared-memory", act)


def test_an_older_controller_is_refused():
    async def act(workers: Workers) -> None:
        await workers.group.order(2, "pid")
        with pytest.raises(SupersededError, match="worker obeys controller 2, not 1: drop is refused"):
            await workers.group.order(1, "drop", [(1, 0)])
        assert (1, 0) in await workers.group.held()

    play("shared-memory", act)


def test_a_shard_that_is_drained_gives_back_what_is_left():
    async def act(workers: Workers) -> None:
        long = GenerationRequest("long", REQUEST.prompt, SamplingParams(900, seed=1))
        await workers.shard.submit("replica", [long], [])
        assert await workers.shard.drain(0.1) == 1
        await asyncio.sleep(0.05)
        assert workers.got[-1].finish_reason is not None and workers.got[-1].finish_reason.value == "moved"

    play("shared-memory", act)
