"""The Ray actor that hosts routed experts. Stateless but for weights."""

from __future__ import annotations

import asyncio

from isotherm.actors.experts.native_loop import ExpertLoop
from isotherm.actors.experts.python_loop import ExpertServer, ServerCounts
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.protocol import Loops
from isotherm.actors.links.registry import carrier
from isotherm.actors.worker import WorkerBase
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.meters import GroupMeter
from isotherm.cluster.messages.workers import Meeting, WorkerSpec
from isotherm.kernels.native import ring as native_ring
from isotherm.kernels.native.backend import NativeKernels


class ExpertGroup(WorkerBase):
    """`slots` bounds how many experts fit."""

    def __init__(self, spec: WorkerSpec, host: str, slots: int):
        super().__init__(spec, host)
        native = isinstance(self.kernels, NativeKernels) and native_ring.unavailable_reason() is None
        self.worker = ExpertWorker(
            self.checkpoint.config, self.kernels, slots, native_ring.NativeGate() if native else None
        )
        self.server = ExpertServer(self.worker)
        self.loop = ExpertLoop(self.worker, spec.gather_window) if native else None
        # of what is held: a controller that comes back may ask while one that is gone still has experts loaded
        self._changing = asyncio.Lock()

    async def load(self, experts: list[tuple[int, int]]) -> None:
        """Load (layer, expert) pairs from the checkpoint."""
        async with self._changing:
            await asyncio.to_thread(self._load, experts)
        self.loaded = True

    def _load(self, experts: list[tuple[int, int]]) -> None:
        with self._reading() as reader:
            self.worker.load(reader, experts, self._set_progress)

    async def drop(self, experts: list[tuple[int, int]]) -> None:
        """Free the weights of (layer, expert) pairs that no shard routes here any more; of a load that failed only some
        may be held."""
        async with self._changing:
            for pair in experts:
                if self.worker.holds(*pair):
                    self.worker.drop(*pair)

    async def held(self) -> list[tuple[int, int]]:
        """The (layer, expert) pairs that are loaded, when no load is under way."""
        async with self._changing:
            return self.worker.pairs()

    async def connect(self, shard: str, meeting: Meeting) -> None:
        """Meet a shard and serve it."""
        loops = Loops(self.server, self.loop)
        await asyncio.to_thread(carrier(meeting.kind).accept, meeting, self.link_end(), shard, loops)

    async def sign_of_life(self) -> None:
        await self.server.pulse.felt()
        if self.loop is not None:
            await self.loop.felt()

    def _counts(self) -> ServerCounts:
        return self.server.counts if self.loop is None else self.server.counts + self.loop.counts

    async def meter(self) -> GroupMeter:
        """Its load, for the autoscaler; quick, and nothing in the token path waits for it."""
        c = self._counts()
        return GroupMeter(
            messages=c.messages,
            computations=c.computations,
            rows=c.pairs,
            busy_seconds=c.busy_seconds,
            held_seconds=c.held_seconds,
            experts=self.worker.held,
            weight_bytes=self.worker.bank.nbytes,
        )

    async def status(self) -> JSON:
        counts, links = self._counts(), self.server.links()
        if self.loop is not None:
            links = links | self.loop.links()
        return {
            **self._common_status(),
            "experts": self.worker.held,
            "free_slots": self.worker.free_slots,
            "weight_bytes": self.worker.bank.nbytes,
            "links": links,
            "thread": self.server.thread.native_id if self.loop is None else self.loop.thread,
            "messages": counts.messages,
            "computations": counts.computations,
            "gathered": counts.gathered,
            "pairs": counts.pairs,
            "refused": counts.refused,
            "busy_seconds": round(counts.busy_seconds, 3),
            "held_seconds": round(counts.held_seconds, 3),
        }
