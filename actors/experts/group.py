"""The Ray actor that hosts routed experts. Stateless but for weights."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from isotherm.actors.experts.native_loop import ExpertLoop
from isotherm.actors.experts.python_loop import ExpertServer, ServerCounts
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.process_group import ProcessGroupServerLink
from isotherm.actors.links.shared_memory import SharedMemoryServerLink, meet_shard, new_bell
from isotherm.actors.models.weights import WeightReader
from isotherm.actors.worker import WorkerBase
from isotherm.cluster.messages.meters import GroupMeter
from isotherm.cluster.messages.workers import Meeting, WorkerSpec
from isotherm.kernels.native import ring as native_ring
from isotherm.kernels.native.backend import NativeKernels


class ExpertGroup(WorkerBase):
    """`slots` bounds how many experts fit."""

    def __init__(self, spec: WorkerSpec, host: str, slots: int):
        super().__init__(spec, host)
        # The native loop serves links in shared memory where the kernels are native too; the Python one serves all
        # others.
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
        with WeightReader(self.checkpoint) as reader:
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
        if meeting.kind == "shared-memory":
            await asyncio.to_thread(self._connect_shared_memory, shard, meeting)
        else:
            group, lane = await asyncio.to_thread(self._meet, meeting, 1)
            self.server.attach(
                shard, ProcessGroupServerLink(group, self.checkpoint.config.hidden_size, self.kernels.device, lane)
            )

    def _connect_shared_memory(self, shard: str, meeting: Meeting) -> None:
        if self.loop is not None:
            self.loop.attach(shard, meet_shard(meeting.prefix, self.loop.bell, meeting.timeout))
            return
        bell = new_bell()
        try:
            met = meet_shard(meeting.prefix, bell, meeting.timeout)
        except BaseException:
            os.close(bell)
            raise
        self.server.attach(shard, SharedMemoryServerLink(met, bell))

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
            c.messages,
            c.computations,
            c.pairs,
            c.busy_seconds,
            c.held_seconds,
            self.worker.held,
            self.worker.bank.nbytes,
        )

    async def status(self) -> dict[str, Any]:
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
