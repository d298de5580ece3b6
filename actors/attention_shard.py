"""The Ray actor that hosts an attention shard: engine, links to every expert group, and one stream of deltas per ingress replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from isotherm.actors.engine import Engine
from isotherm.actors.exchange import ExpertExchange, Link
from isotherm.actors.model import AttentionModel
from isotherm.actors.outbox import FLUSH, Outbox
from isotherm.actors.process_group_link import ProcessGroupLink
from isotherm.actors.shared_memory_link import SharedMemoryLink, segment_bytes
from isotherm.actors.step_loop import StepLoop
from isotherm.actors.weights import WeightReader
from isotherm.actors.worker_base import Meeting, WorkerBase, WorkerSpec
from isotherm.cluster.metering import DecayedMean, ShardMeter
from isotherm.cluster.placement import Placement
from isotherm.cluster.requests import Delta, GenerationRequest, merged_deltas
from isotherm.cluster.scheduler import SchedulerConfig

log = logging.getLogger(__name__)
INGRESS_SILENCE = 15.0  # seconds without a call after which an ingress replica counts as gone
METER_HALF_LIFE = 10.0  # seconds after which a time to first token counts half


class AttentionShard(WorkerBase):
    def __init__(self, spec: WorkerSpec, host: str, scheduler: SchedulerConfig):
        super().__init__(spec, host)
        self._scheduler_config = scheduler
        self._model: AttentionModel | None = None
        self._links: dict[str, Link] = {}
        self._exchange: ExpertExchange | None = None
        self._steps: StepLoop | None = None
        self._owner: dict[str, str] = {}  # request → ingress replica
        self._fresh: deque[list[Delta]] = deque()  # of steps; filled by the step loop
        self._delivering = False  # the next look at them is sure to come
        self._next_look: asyncio.TimerHandle | None = None
        self._outboxes: dict[str, Outbox] = {}  # by ingress replica
        self._lists: dict[str, asyncio.Queue[list[Delta]]] = {}  # ingress replica → what its stream is to bring
        self._heard: dict[str, float] = {}  # ingress replica → when it last called
        self._reaper: asyncio.Task | None = None
        self._tokens = 0
        self._arrived: dict[str, float] = {}  # requests without a token yet → when they came, oldest first
        self._first_token = DecayedMean(METER_HALF_LIFE)

    # --- called by the controller ----------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load everything but the routed experts."""
        self._model = await asyncio.to_thread(self._load)
        self.loaded = True

    def _load(self) -> AttentionModel:
        with WeightReader(self.checkpoint) as reader:
            positions = self._scheduler_config.max_model_len
            return AttentionModel(self.checkpoint.config, self.kernels, reader, positions, self._set_progress, self.spec.head)

    async def connect(self, group: str, meeting: Meeting) -> None:
        """Meet an expert group; rows go there once a placement names it."""
        self._links[group] = await asyncio.to_thread(self._connect, meeting)

    def _connect(self, meeting: Meeting) -> Link:
        if meeting.kind != "shared-memory":
            group, lane = self._meet(meeting, 0)
            return ProcessGroupLink(group, self.spec.link_timeout, self.kernels.device, lane)
        config = self.checkpoint.config
        nbytes = segment_bytes(config.hidden_size, self.kernels.dtype.itemsize, self._scheduler_config.max_batch_tokens, config.num_experts_per_tok)
        return SharedMemoryLink.open(meeting.prefix, nbytes, self.spec.link_timeout, meeting.timeout)

    async def adopt(self, placement: Placement) -> int:
        """Route by `placement` from the next step on; the engine starts with the first one. Returns its version, as the acknowledgement."""
        if self._model is None:
            raise RuntimeError(f"{self.spec.id} has not loaded its weights")
        if missing := [group for group in placement.groups() if group not in self._links]:
            raise ValueError(f"placement version {placement.version} names groups {missing} that {self.spec.id} has no link to")
        if self._exchange is None or self._steps is None:
            self._exchange = ExpertExchange(self.kernels, placement, self._links)
            loop = asyncio.get_running_loop()
            engine = Engine(self._model, self._exchange, self._scheduler_config)

            def publish(deltas: list[Delta]) -> None:
                # The event loop takes Python's lock from the step loop: it is woken where it sleeps only, not at every step.
                self._fresh.append(deltas)
                if not self._delivering:
                    self._delivering = True
                    loop.call_soon_threadsafe(self._deliver)

            self._steps = StepLoop(engine, publish)
            self._reaper = asyncio.create_task(self._reap())
            return placement.version
        exchange, adopted, loop = self._exchange, asyncio.Event(), asyncio.get_running_loop()

        def acknowledge() -> None:
            loop.call_soon_threadsafe(adopted.set)

        # At a layer boundary of the step under way, which may be waiting for just this placement; where none is, before the next.
        exchange.offer(placement, dict(self._links), acknowledge)
        self._steps.between_steps(exchange.adopt_offered)
        await adopted.wait()
        return placement.version

    async def disconnect(self, group: str) -> None:
        """Close the link to a group that the adopted placement does not name."""
        if self._exchange is not None and group in self._exchange.placement.groups():
            raise RuntimeError(f"{self.spec.id} routes to {group} by placement version {self._exchange.placement.version}")
        if (link := self._links.pop(group, None)) is not None:
            await asyncio.to_thread(link.close)

    async def drain(self, seconds: float) -> int:
        """Wait until no request is left, at most so long, then give back the rest, to be resubmitted elsewhere. How many were given back. The
        caller has made sure that no new ones come."""
        deadline = time.monotonic() + seconds
        while self._owner and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        left = list(self._owner)
        if self._steps is not None:
            for request_id in left:
                self._steps.give_back(request_id)
        while self._owner or any(map(len, self._outboxes.values())) or any(not lists.empty() for lists in self._lists.values()):
            await asyncio.sleep(0.01)
        return len(left)

    async def rows_routed(self) -> np.ndarray:
        """Rows sent to each (layer, expert) since the start, int64 [layers, experts]."""
        return np.zeros((0, 0), dtype=np.int64) if self._exchange is None else self._exchange.rows_routed.copy()

    async def meter(self) -> ShardMeter:
        """Its load, for the autoscaler; quick, and nothing in the token path waits for it. Raises RuntimeError before the first placement."""
        if self._steps is None or self._exchange is None:
            raise RuntimeError(f"{self.spec.id} is not serving yet")
        engine, now = self._steps.engine, time.monotonic()
        scheduler = engine.scheduler
        return ShardMeter(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            capacity=self._scheduler_config.max_sequences,
            kv_used=scheduler.blocks.used / scheduler.blocks.blocks,
            tokens=self._tokens,
            steps=engine.steps,
            first_token_seconds=self._first_token.value(now),
            longest_wait=now - next(iter(self._arrived.values()), now),
            group_wait=dict(self._exchange.waited),
            rows_routed=self._exchange.rows_routed.copy(),
            reads=self._exchange.reads.copy(),
        )

    async def status(self) -> dict[str, Any]:
        out = {**self._common_status(), "links": {group: link.kind for group, link in self._links.items()}}
        if self._steps is not None and self._exchange is not None:
            engine = self._steps.engine
            scheduler = engine.scheduler
            out |= {
                "placement_version": self._exchange.placement.version,
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "kv_blocks_used": scheduler.blocks.used,
                "kv_blocks_cached": scheduler.blocks.cached,
                "kv_blocks": scheduler.blocks.blocks,
                "preemptions": scheduler.preemptions,
                "steps": engine.steps,
                "tokens": self._tokens,
                "group_wait": {group: round(seconds, 3) for group, seconds in self._exchange.waited.items()},
            }
        return out

    # --- called by ingress replicas --------------------------------------------------------------------------------------------------

    async def submit(self, ingress: str, requests: list[GenerationRequest], aborts: list[str]) -> None:
        """Take new requests, then abort others. An empty call is a sign of life: an ingress replica that falls silent has its requests aborted."""
        self._heard[ingress] = time.monotonic()
        self._lists_of(ingress)  # the stream may be opened a moment later
        if self._steps is None:
            raise RuntimeError(f"{self.spec.id} is not serving yet")
        for request in requests:
            self._owner[request.id] = ingress
            self._arrived[request.id] = time.monotonic()
            self._steps.submit(request)
        for request_id in aborts:
            self._abort(ingress, request_id)

    def _abort(self, ingress: str, request_id: str) -> None:
        if self._steps is not None and self._owner.get(request_id) == ingress:
            self._steps.abort(request_id)

    async def stream(self, ingress: str) -> AsyncIterator[list[Delta]]:
        """All deltas of this ingress replica's requests: a list per engine step, or of several steps where they are faster than Outbox lets them go.
        """
        self._heard[ingress] = time.monotonic()
        lists = self._lists_of(ingress)
        while True:
            yield await lists.get()

    def _lists_of(self, ingress: str) -> asyncio.Queue[list[Delta]]:
        if ingress not in self._lists:
            self._lists[ingress], self._outboxes[ingress] = asyncio.Queue(), Outbox()
        return self._lists[ingress]

    def _deliver(self) -> None:
        """Send what is due, and look again in a moment, until there is nothing left."""
        if self._next_look is not None:
            self._next_look.cancel()  # the step loop may have asked for a look that was sure to come
        fresh: list[Delta] = []
        while self._fresh:
            fresh += self._fresh.popleft()
        now = time.monotonic()
        try:
            self._route(merged_deltas(fresh), now)
            for ingress, outbox in self._outboxes.items():
                if deltas := outbox.due(now):
                    self._lists[ingress].put_nowait(deltas)
        finally:
            more = bool(fresh) or any(map(len, self._outboxes.values()))
            if not more:
                self._delivering = False
                more = bool(self._fresh)  # of a step that ended just now, and may have found it still set
            self._delivering = self._delivering or more
            self._next_look = asyncio.get_running_loop().call_later(FLUSH, self._deliver) if more else None

    def _route(self, deltas: list[Delta], now: float) -> None:
        by_ingress: dict[str, list[Delta]] = {}
        for delta in deltas:
            ingress = self._owner.get(delta.request_id)
            self._tokens += len(delta.token_ids)
            if delta.token_ids or delta.finish_reason is not None:
                arrived = self._arrived.pop(delta.request_id, None)
                if arrived is not None and delta.token_ids:
                    self._first_token.add(now - arrived, now)
            if ingress is not None:
                by_ingress.setdefault(ingress, []).append(delta)
                if delta.finish_reason is not None:
                    del self._owner[delta.request_id]
        for ingress, mine in by_ingress.items():
            if (outbox := self._outboxes.get(ingress)) is not None:  # else it fell silent
                outbox.put(mine)

    async def _reap(self) -> None:
        """Abort the requests of ingress replicas that went away without a word."""
        while True:
            await asyncio.sleep(INGRESS_SILENCE / 3)
            limit = time.monotonic() - INGRESS_SILENCE
            for ingress in [i for i, heard in self._heard.items() if heard < limit]:
                log.warning("ingress %s fell silent; its requests are aborted", ingress)
                for request_id in [r for r, owner in self._owner.items() if owner == ingress]:
                    self._abort(ingress, request_id)
                self._lists.pop(ingress, None)
                self._outboxes.pop(ingress, None)
                self._heard.pop(ingress, None)
