"""The Ray actor that hosts routed experts. Stateless but for weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from isotherm.actors.experts.copy_server import CopyServer
from isotherm.actors.experts.expert_loads import ExpertLoads
from isotherm.actors.experts.native_loop import NativeLoop
from isotherm.actors.experts.python_loop import PythonLoop, ServerCounts
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.protocol import Loops
from isotherm.actors.links.registry import carrier, own_locality
from isotherm.actors.worker import WorkerBase
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.copies import CopyOffer, CopySource
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
        self.server = PythonLoop(self.worker)
        self.loop = NativeLoop(self.worker, spec.gather_window) if native else None
        self._loads = ExpertLoads(self.worker, spec.copy_from)
        self._copied_before = 0  # bytes, when the last load began
        self._copies_turn = threading.Lock()
        self._copies: dict[str, CopyServer] = {}  # by how its peers reach it; made when it is first asked
        # of what is held: a controller that comes back may ask while one that is gone still has experts loaded
        self._changing = asyncio.Lock()

    async def load(self, experts: list[tuple[int, int]], sources: Sequence[CopySource] = ()) -> None:
        """Load (layer, expert) pairs: from the checkpoint, or where that is faster from a peer that offers them."""
        tag = await self._tag() if sources else None
        async with self._changing:
            await asyncio.to_thread(self._load, experts, sources, tag)
        self.loaded = True

    def _load(self, experts: list[tuple[int, int]], sources: Sequence[CopySource], tag: str | None) -> None:
        self._copied_before = self._loads.copied_bytes
        with self._reading() as reader:
            self._loads.load(reader, experts, sources, tag, self._set_progress)

    def _read_so_far(self) -> tuple[int, float]:
        """What has been copied is among it."""
        nbytes, seconds = super()._read_so_far()
        return nbytes + self._loads.copied_bytes - self._copied_before, seconds

    async def _tag(self) -> str | None:
        """Of what it packs: groups with equal tags have the same bytes. None: nobody else can take them."""
        layout = self.worker.bank.layout
        return None if layout is None else f"{layout}, {(await self.fingerprint()).digest}"

    async def offer(self, machine: str) -> CopyOffer | None:
        """Leave for a peer on this machine (see Locality) or another one to copy experts; None where what is packed
        here is of no use elsewhere."""
        if (tag := await self._tag()) is None:
            return None
        near = machine != "" and machine == own_locality().machine
        server = self._copies.get(way := "near" if near else "far")
        if server is None:
            server = self._copies[way] = CopyServer(self.worker, tag, None if near else self.host, self._copies_turn)
        return server.offer(self.spec.id)

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
            figures=self._loads.figures(),
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
            "loaded_from": self._loads.told(),
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
