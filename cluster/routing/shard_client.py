"""The engine as an ingress replica sees it: the attention shards that the controller names, one connection to each.
Knows nothing about Ray: `Cluster` is what it needs of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Protocol

from isotherm.cluster.api.engine_client import EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.background import Background, pauses
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.membership import UNCHANGED_SECONDS, Membership, ShardLimits, WorkerGoneError
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest
from isotherm.cluster.routing.connection import Connection, Shard
from isotherm.cluster.routing.journey import LOSSES, Journey
from isotherm.cluster.routing.prefixes import Prefixes
from isotherm.cluster.routing.trial import Trial
from isotherm.cluster.within import within

log = logging.getLogger(__name__)
ADMISSION_SECONDS = 60.0  # how long a request without a token waits while every shard is lost
RESUBMIT_SECONDS = 120.0  # how long a stream that has begun waits for a shard to go on at
# Tokens of a prompt that need not be computed at a shard outweigh one more open request there: on two cores both cost
# the streams that run about as much.
TOKENS_OF_A_REQUEST = 128
WATCH_SECONDS = UNCHANGED_SECONDS + 15.0  # in which the controller answers; else the question was lost
RECONNECT = 0.25, 5.0  # seconds before a connection that was lost is made again: at first, and at most


class WeightsGoneError(EngineUnavailableError):
    """The weights that the request is bound to are not served any more, nor will they be."""


class Cluster(Protocol):
    """Where shards are found."""

    async def watch(self, known_version: int) -> Membership:
        """The membership as soon as it is newer, or after UNCHANGED_SECONDS the same again."""

    async def shard(self, name: str) -> Shard:
        """Raises WorkerGoneError."""

    async def status(self) -> JSON:
        """What the controller says of itself and the workers."""


class ShardClient:
    """EngineClient over the shards that the controller names. Start it with `start` on the event loop that uses it."""

    def __init__(
        self,
        cluster: Cluster,
        vocab_size: int,
        limits: ShardLimits,
    ):
        """`limits`: of the shards that serve, until the controller tells of others."""
        self.vocab_size, self._limits = vocab_size, limits
        self._cluster = cluster
        self._connections: dict[str, Connection] = {}  # by shard
        self._membership: Membership | None = None
        # By fingerprint: the revisions that had it when they served, each with the length of its longest request
        self._revisions: dict[str, dict[int, int]] = {}
        self._prefixes = Prefixes()
        self._trial = Trial()  # of requests under which a shard was lost, until they get on again
        self.background = Background()
        self.system_fingerprint = ""

    def start(self) -> None:
        self.background.keep("the watch over the membership", self._follow_membership)

    # --- EngineClient -----------------------------------------------------------------------------

    def not_ready(self) -> str | None:
        if self._membership is None:
            return "the controller has not been found yet"
        if self._membership.not_ready is not None:
            return self._membership.not_ready
        return None if self._serving() else "no attention shard can be reached"

    async def held_up(self) -> str | None:
        """Of any shard that takes new requests: the next one may go there."""
        said = await asyncio.gather(*(connection.held_up() for connection in self._serving()))
        return "; ".join(filter(None, said)) or None

    @property
    def max_model_len(self) -> int:
        return self._limits.max_model_len

    def capacity(self) -> int:
        return self._limits.requests * max(1, len(self._serving()))

    def token_capacity(self) -> int:
        return self._limits.tokens * max(1, len(self._serving()))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """As EngineClient says. A request whose shard is lost or drained goes on at another that has the weights of the
        request's fingerprint, from the tokens that were already given out."""
        journey = Journey(request)
        if self._will_serve():
            connection = await self._choose_within(ADMISSION_SECONDS, request)
        else:
            connection = self._choose(request)
        while True:
            async with (
                self._trial.place(journey) as place,
                aclosing(connection.attempt(journey.resumed(), journey.is_suspect)) as deltas,
            ):
                async for delta in deltas:
                    if not journey.take(delta, place.in_company):
                        if delta.finish_reason in LOSSES:
                            place.lost()
                        break
                    if delta.finish_reason is FinishReason.REFUSED:
                        raise EngineOverloadedError(delta.error)
                    if delta.token_ids or delta.prompt is not None:
                        place.cleared()
                    yield journey.told(delta)
                    if delta.finish_reason is not None:
                        return
            log.info("request %s goes on elsewhere after %d tokens", request.id, journey.tokens)
            if (end := journey.verdict(self._trial.losses_allowed())) is not None:
                self._trial.found(journey)
                log.error("request %s: %s", request.id, end.error)
                yield journey.told(end)
                return
            if not journey.has_begun:
                connection = await self._choose_within(ADMISSION_SECONDS, request)
                continue
            try:
                connection = await self._choose_within(RESUBMIT_SECONDS, request)
            except EngineUnavailableError as error:
                yield journey.told(journey.failure(f"its attention shard was lost, and {error}"))
                return

    async def status(self) -> JSON:
        return await self._cluster.status()

    # --- shards -----------------------------------------------------------------------------------

    def _serving(self) -> list[Connection]:
        """Those that take new requests."""
        return self._open(() if self._membership is None else self._membership.shards)

    def _open(self, names: Iterable[str]) -> list[Connection]:
        return [c for name in names if (c := self._connections.get(name)) is not None and c.is_open]

    def _able(self, request: GenerationRequest) -> list[Connection]:
        """Shards that may have the request. Raises EngineUnavailableError where there are none."""
        membership, known = self._membership, self._revisions.get(request.fingerprint)
        if membership is None or known is None:
            if (reason := self.not_ready()) is not None:
                raise EngineUnavailableError(reason)
            return self._serving()
        # What the bits depend on they have in common; a shard that takes fewer tokens would end it early.
        needed = min(len(request.prompt) + request.params.max_tokens, max(known.values()))
        there = {membership.revision: membership.shards, **membership.others}
        able = [revision for revision, longest in known.items() if longest >= needed and revision in there]
        if not able:
            raise WeightsGoneError(
                f"the weights {request.fingerprint} that it began with are not served any more"
                if membership.revision not in known
                else f"it began where requests have up to {max(known.values())} tokens, and those that serve take fewer"
            )
        for revision in sorted(able, reverse=True):  # those that serve come first
            reachable = revision != membership.revision or membership.not_ready is None
            if reachable and (shards := self._open(there[revision])):
                return shards
        if membership.revision in able and (reason := self.not_ready()) is not None:
            raise EngineUnavailableError(reason)
        raise EngineUnavailableError(f"no attention shard with the weights {request.fingerprint} can be reached")

    def _choose(self, request: GenerationRequest) -> Connection:
        """The least loaded shard; one that has others of the family comes before, since it has computed their prompt,
        and one that should have the beginning of the prompt counts as less loaded. Both as long as it can run one more:
        to wait there while others are idle would take longer than the prompt."""
        serving, family = self._able(request), request.family
        if len(serving) == 1:
            return serving[0]
        related = [c for c in serving if family and c.families[family]]
        able = [c for c in related if c.load < self._limits.max_sequences]
        cached = self._prefixes.cached(request)

        def load(connection: Connection) -> float:
            saved = cached.get(connection.name, 0) if connection.load < self._limits.max_sequences else 0
            return connection.load - saved / TOKENS_OF_A_REQUEST

        chosen = min(able or serving, key=lambda c: (load(c), c not in related))
        self._prefixes.sent(request, chosen.name)
        return chosen

    def _will_serve(self) -> bool:
        """Whether waiting for a shard is worth it: the cluster serves, or has lost every shard and replaces them. Where
        it serves there may be none either, for a moment: a shard can be gone before the controller has said so."""
        return self._membership is not None and (self._membership.recovering or self._membership.not_ready is None)

    async def _choose_within(self, seconds: float, request: GenerationRequest) -> Connection:
        """Like `_choose`, but waits for a shard. Raises EngineUnavailableError when the time is over, WeightsGoneError
        at once."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                return self._choose(request)
            except WeightsGoneError:
                raise
            except EngineUnavailableError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(0.05)

    async def _follow_membership(self) -> None:
        while True:
            known = -1 if self._membership is None else self._membership.version
            try:
                membership = await within(WATCH_SECONDS, self._cluster.watch(known))
            except TimeoutError:
                log.warning("the controller has not answered in %g s; it is asked again", WATCH_SECONDS)
                continue
            except WorkerGoneError as error:
                log.warning("no controller: %s", one_line(error))
                await asyncio.sleep(0.5)
                continue
            if membership.version > known:
                self._adopt(membership)

    def _adopt(self, membership: Membership) -> None:
        self._membership = membership
        self._limits, self.system_fingerprint = membership.limits, membership.system_fingerprint
        if membership.system_fingerprint:
            known = self._revisions.setdefault(membership.system_fingerprint, {})
            known[membership.revision] = membership.limits.max_model_len
        for name in self._named():
            if name not in self._connections:
                self._connections[name] = Connection(name, lambda: self._limits.hangs_after)
                self.background.spawn(f"the connection to {name}", self._keep_connected(self._connections[name]))

    def _named(self) -> list[str]:
        """Every shard that the controller names."""
        membership = self._membership
        return [] if membership is None else [*membership.shards, *itertools.chain(*membership.others.values())]

    async def _keep_connected(self, connection: Connection) -> None:
        """Connect again and again, as long as the controller names the shard. One that is named no more takes no new
        requests; those that it has, it finishes, or gives back when its time is over."""
        name, clock, waits = connection.name, asyncio.get_running_loop().time, pauses(*RECONNECT)
        try:
            while True:
                begin = clock()
                try:
                    reason = await connection.run(await self._cluster.shard(name))
                except WorkerGoneError as error:
                    reason = one_line(error)
                except Exception as error:
                    log.exception("the connection to %s failed", name)
                    reason = one_line(error)
                log.warning("the connection to attention shard %s has ended: %s", name, reason)
                if name not in self._named():
                    return
                if clock() > begin + RECONNECT[1]:
                    waits = pauses(*RECONNECT)
                await asyncio.sleep(next(waits))
        finally:
            del self._connections[name]
