"""The Ray actor that hosts an attention shard: engine, links to every expert group, and one stream of deltas per
ingress replica."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict

import numpy as np

from isotherm.actors.attention.delivery import LOOK, Delivery
from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.masks import Masks
from isotherm.actors.attention.sampling import Sampler
from isotherm.actors.attention.speculation import speculation_of
from isotherm.actors.attention.step_loop import StepLoop
from isotherm.actors.links.protocol import Link
from isotherm.actors.links.registry import carrier
from isotherm.actors.models.local_experts import LocalExperts, draft_experts
from isotherm.actors.models.protocol import AttentionModel
from isotherm.actors.models.registry import load_model
from isotherm.actors.pulse import Pulse
from isotherm.actors.worker import WorkerBase
from isotherm.cluster.background import Background
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.meters import ShardMeter
from isotherm.cluster.messages.requests import Delta, GenerationRequest
from isotherm.cluster.messages.workers import LinkFailure, Meeting, WorkerSpec
from isotherm.cluster.placement.table import Placement
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary
from isotherm.cluster.text.tokenizer import Tokenizer

POLL_SECONDS = 30.0  # after which `failed_links` answers also where nothing has changed
COMPILING_SECONDS = 300.0  # that a piece of work may take on a GPU, where kernels are compiled at their first call
ASK_AGAIN = 0.05  # seconds from an answer that rows do not get through to the next question
GIVE_BACK_SECONDS = 30.0  # in which a shard that is drained has given back what is left


class AttentionShard(WorkerBase):
    def __init__(self, spec: WorkerSpec, host: str, scheduler: SchedulerConfig):
        super().__init__(spec, host)
        self._scheduler_config = scheduler
        self._model: AttentionModel | None = None
        self._draft_experts: LocalExperts | None = None
        self._links: dict[str, Link] = {}
        self._links_made: Counter[str] = Counter()  # to each group, ever
        self._failed_links: dict[str, LinkFailure] = {}  # by group: links that are of no more use
        self._links_version = 0  # of the above
        self._links_changed = asyncio.Event()
        self._exchange: ExpertExchange | None = None
        self._steps: StepLoop | None = None
        self._delivery: Delivery | None = None
        self._background = Background()

    # --- called by the controller -----------------------------------------------------------------

    async def load(self) -> None:
        """Load everything but the routed experts."""
        self._model = await asyncio.to_thread(self._load)
        self.loaded = True

    def _load(self) -> AttentionModel:
        with self._reading() as reader:
            positions = self._scheduler_config.max_model_len
            model = load_model(
                self.checkpoint.config,
                self.kernels,
                reader,
                positions,
                kv_cache_dtype=self.spec.kv_cache_dtype,
                progress=self._set_progress,
            )
            self._draft_experts = draft_experts(self.checkpoint.config, self.kernels, reader)
            return model

    async def connect(self, group: str, meeting: Meeting) -> None:
        """Meet an expert group; rows go there once a placement names it. A second link to a group takes the place of
        the first."""
        most_rows = self._scheduler_config.max_batch_tokens
        link = await asyncio.to_thread(carrier(meeting.kind).open, meeting, self.link_end(), most_rows)
        old, self._links[group] = self._links.get(group), link
        self._links_made[group] += 1
        self._link_is_whole(group)
        if self._exchange is not None and self._steps is not None:
            self._exchange.relink(group, link)
            self._steps.between_steps(self._exchange.adopt_offered)
        if old is not None:
            await asyncio.to_thread(old.close)

    async def failed_links(self, known: int) -> tuple[int, dict[str, LinkFailure]]:
        """Which links have failed and wait for others in their place: (version, {group: failure}), as soon as the
        version is not the one that is known, and after a while in any case."""
        if known == self._links_version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._links_changed.wait(), POLL_SECONDS)
        return self._links_version, dict(self._failed_links)

    def _link_failed(self, group: str, link: Link, reason: str) -> None:
        if self._links.get(group) is link:  # else it has another already
            self._failed_links[group] = LinkFailure(self._links_made[group], reason)
            self._tell_links()

    def _link_is_whole(self, group: str) -> None:
        if self._failed_links.pop(group, None) is not None:
            self._tell_links()

    def _tell_links(self) -> None:
        self._links_version += 1
        self._links_changed.set()
        self._links_changed = asyncio.Event()

    async def adopt(self, placement: Placement) -> int:
        """Route by `placement` from the next step on; the engine starts with the first one. Returns its version, as the
        acknowledgement."""
        if missing := [group for group in placement.groups() if group not in self._links]:
            version = placement.version
            raise ValueError(f"placement version {version} names groups {missing} that {self.spec.id} has no link to")
        if self._exchange is None or self._steps is None:
            self._begin(placement)
            return placement.version
        adopted, loop = asyncio.Event(), asyncio.get_running_loop()

        def acknowledge() -> None:
            loop.call_soon_threadsafe(adopted.set)

        # At a layer boundary of the step under way, which may be waiting for just this placement; where none is, before
        # the next.
        self._exchange.offer(placement, self._links, acknowledge)
        self._steps.between_steps(self._exchange.adopt_offered)
        await adopted.wait()
        return placement.version

    def _begin(self, placement: Placement) -> None:
        """Start the engine."""
        if self._model is None:
            raise RuntimeError(f"{self.spec.id} has not loaded its weights")
        loop = asyncio.get_running_loop()
        pulse = Pulse(least=COMPILING_SECONDS if self.spec.device == "cuda" else 0.0)

        def link_failed(group: str, link: Link, reason: str) -> None:
            loop.call_soon_threadsafe(self._link_failed, group, link, reason)

        hidden = self.checkpoint.config.hidden_size
        exchange = ExpertExchange(
            self.kernels, placement, self._links, link_failed=link_failed, pulse=pulse, hidden=hidden
        )
        sampler = Sampler(self.kernels, Masks(self._grammar_vocabulary))
        engine = Engine(self._model, exchange, self._scheduler_config, sampler=sampler)
        c, tokens = self.checkpoint.config, self.spec.draft_tokens
        engine.speculation = speculation_of(
            self.speculation, tokens, engine, c.n_routed_experts, c.num_experts_per_tok, self._draft_experts
        )
        self._delivery = Delivery(lambda request_id: steps.abort(request_id))
        self._steps = steps = StepLoop(engine, self._delivery.publish, pulse)
        self._exchange = exchange
        self._background.keep("the watch over silent replicas", self._close_silent)

    def _grammar_vocabulary(self) -> GrammarVocabulary:
        return Tokenizer.load(self.checkpoint.path).grammar_vocabulary(self.checkpoint.config.vocab_size)

    async def _close_silent(self) -> None:
        while self._delivery is not None:
            await asyncio.sleep(LOOK)
            self._delivery.close_silent()

    async def disconnect(self, group: str) -> None:
        """Close the link to a group that the adopted placement does not name."""
        if self._exchange is not None and group in self._exchange.placement.groups():
            version = self._exchange.placement.version
            raise RuntimeError(f"{self.spec.id} routes to {group} by placement version {version}")
        self._link_is_whole(group)
        if (link := self._links.pop(group, None)) is not None:
            await asyncio.to_thread(link.close)

    async def drain(self, seconds: float) -> int:
        """Wait until no request is left, at most so long, then give back the rest, to be resubmitted elsewhere. How
        many were given back. The caller has made sure that no new ones come."""
        if self._steps is None or self._delivery is None:
            return 0
        deadline = time.monotonic() + seconds
        while (left := self._delivery.open_ids()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for request_id in left:
            self._steps.give_back(request_id)
        deadline = max(deadline, time.monotonic()) + GIVE_BACK_SECONDS
        while not self._delivery.is_empty and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return len(left)

    async def expect_experts(self) -> None:
        """Those that a step may wait for are being loaded: it waits on."""
        if self._exchange is not None:
            self._exchange.offers.expect()

    async def open_requests(self) -> int:
        """Requests that it has, running or waiting; 1 where there are none, and last deltas were not fetched yet."""
        if self._delivery is None:
            return 0
        return len(self._delivery.open_ids()) or int(not self._delivery.is_empty)

    async def sign_of_life(self) -> None:
        if self._steps is not None:
            await self._steps.pulse.felt()

    async def waits_for(self) -> tuple[str, float]:
        return ("", 0.0) if self._steps is None else self._steps.pulse.waited()

    async def rows_routed(self) -> np.ndarray:
        """Rows sent to each (layer, expert) since the start, int64 [layers, experts]."""
        return np.zeros((0, 0), dtype=np.int64) if self._exchange is None else self._exchange.rows_routed.copy()

    async def meter(self) -> ShardMeter:
        """Its load, for the autoscaler; quick, and nothing in the token path waits for it. Raises RuntimeError before
        the first placement."""
        if self._steps is None or self._exchange is None or self._delivery is None:
            raise RuntimeError(f"{self.spec.id} is not serving yet")
        engine = self._steps.engine
        scheduler = engine.scheduler
        return ShardMeter(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            capacity=self._scheduler_config.max_sequences,
            kv_used=scheduler.blocks.used / scheduler.blocks.blocks,
            tokens=self._delivery.tokens,
            steps=engine.steps,
            first_token_seconds=self._delivery.first_token.value(time.monotonic()),
            longest_wait=self._delivery.longest_wait(),
            group_wait=dict(self._exchange.waited),
            rows_routed=self._exchange.rows_routed.copy(),
            reads=self._exchange.reads.copy(),
            figures=engine.figures.read(scheduler, engine.speculation),
        )

    async def status(self) -> JSON:
        links = {group: link.kind for group, link in self._links.items()}
        failed = {group: failure.reason for group, failure in self._failed_links.items()}
        out = {**self._common_status(), "links": links, "failed_links": failed}
        if self._steps is not None and self._exchange is not None and self._delivery is not None:
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
                "tokens": self._delivery.tokens,
                "thread": self._steps.thread.native_id,
                "group_wait": {group: round(seconds, 3) for group, seconds in self._exchange.waited.items()},
            }
            if engine.speculation is not None:
                out["speculation"] = asdict(engine.speculation.meter())
        return out

    # --- called by ingress replicas ---------------------------------------------------------------

    async def held_up(self, seconds: float) -> str:
        """Empty as soon as the rows of a request would get through: the thread that steps has come to a layer's end
        since, or is idle, and every group that it needs has answered. Else, after so many seconds, why not; empty also
        then where a layer has taken as long lately."""
        if self._exchange is None or self._steps is None:
            return f"{self.spec.id} is not serving yet"
        deadline = time.monotonic() + seconds
        while not await self._rows_get_through(deadline):
            if time.monotonic() < deadline:  # they do not: a group is being mended
                await asyncio.sleep(ASK_AGAIN)
                continue
            return "" if self._steps.pulse.as_lately() else f"{self.spec.id} {self._what_it_waits_for(seconds)}"
        return ""

    def _what_it_waits_for(self, seconds: float) -> str:
        whom, waited = ("", 0.0) if self._steps is None else self._steps.pulse.waited()
        if whom:
            return f"has waited for {whom} for {waited:.1f} s"
        if self._failed_links:
            return f"cannot reach {', '.join(sorted(self._failed_links))}"
        return f"has taken no step for {seconds:g} s"

    async def _rows_get_through(self, deadline: float) -> bool:
        assert self._exchange is not None and self._steps is not None
        loop = asyncio.get_running_loop()
        through: asyncio.Future[bool] = loop.create_future()

        def tell(answer: bool) -> None:
            if not through.done():
                through.set_result(answer)

        def answered(answer: bool) -> None:
            loop.call_soon_threadsafe(tell, answer)

        self._exchange.questions.ask(answered)
        self._steps.between_steps(self._exchange.answer_questions)
        done, _ = await asyncio.wait([through], timeout=max(0.0, deadline - time.monotonic()))
        return bool(done) and through.result()

    async def stream(self, connection: str) -> AsyncIterator[list[Delta]]:
        """All deltas of the requests that are submitted over this connection, as Delivery.stream says."""
        if self._delivery is None:
            raise RuntimeError(f"{self.spec.id} is not serving yet")
        async with contextlib.aclosing(self._delivery.stream(connection)) as lists:
            async for deltas in lists:
                yield deltas

    async def submit(self, connection: str, requests: list[GenerationRequest], aborts: list[str]) -> None:
        """Take new requests, then abort others. An empty call is a sign of life: the connection of a replica that falls
        silent is closed. Raises UnknownConnectionError, with nothing done, where it is not open."""
        if self._delivery is None or self._steps is None:
            raise RuntimeError(f"{self.spec.id} is not serving yet")
        self._delivery.hear(connection)
        for request in requests:
            self._delivery.expect(connection, request.id)
            self._steps.submit(request)
        for request_id in aborts:
            if self._delivery.owns(connection, request_id):
                self._steps.abort(request_id)
