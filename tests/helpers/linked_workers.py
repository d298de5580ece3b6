"""The two actors as plain objects in this process: a loaded shard and a loaded group over a real link of any kind."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from isotherm.actors.attention.shard import AttentionShard
from isotherm.actors.experts.group import ExpertGroup
from isotherm.actors.links.rendezvous import Rendezvous
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Delta, GenerationRequest, SamplingParams
from isotherm.cluster.messages.workers import Meeting, WorkerSpec
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.cluster.placement.table import contiguous_placement

SCHEDULER = SchedulerConfig(16, 256, 512, 8, 1024)
REQUEST = GenerationRequest("r", tuple(range(10, 60)), SamplingParams(40, temperature=1.0, seed=3))


class Workers:
    """A loaded shard and a loaded group, linked."""

    def __init__(self, kind: str, speculation: str = "off"):
        self.kind = kind
        self.rendezvous = Rendezvous("127.0.0.1")
        spec = WorkerSpec(
            id="worker",
            model_path=bundled_model(),
            device="cpu",
            dtype="bfloat16",
            weights=WeightChoice(),
            kernels="auto",
            threads=1,
            link_timeout=20.0,
            gather_window=1.0,
            speculation=speculation,
        )
        self.shard = AttentionShard(spec, "127.0.0.1", SCHEDULER)
        config = self.shard.checkpoint.config
        self.placement = contiguous_placement(config.moe_layers, config.n_routed_experts, ["expert-0"])
        self.group = ExpertGroup(spec, "127.0.0.1", len(config.moe_layers) * config.n_routed_experts)
        self.got: list[Delta] = []

    async def link(self) -> None:
        prefix = uuid.uuid4().hex
        meeting = Meeting(self.rendezvous.host, self.rendezvous.port, prefix, 20.0, self.kind)
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

    async def stop(self) -> None:
        """End the thread that steps after the step that it computes. Where that waits for ever it is left, with nobody
        to tell of its tokens: an event loop that is closed it cannot tell, which would end this process."""
        if (steps := self.shard._steps) is not None:
            steps._publish = lambda deltas: None
            steps.close()
            await asyncio.to_thread(steps.thread.join, 1.0)

    async def finished(self) -> list[int]:
        while not self.got or self.got[-1].finish_reason is None:
            await asyncio.sleep(0.01)
        return [token for delta in self.got for token in delta.token_ids]


def play(kind: str, act: Callable[[Workers], Awaitable[None]], speculation: str = "off") -> None:
    async def go() -> None:
        workers = Workers(kind, speculation)
        try:
            await workers.start()
            await asyncio.wait_for(act(workers), 60)
            workers.reader.cancel()
        finally:
            await workers.stop()

    asyncio.run(go())
