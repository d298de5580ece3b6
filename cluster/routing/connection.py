"""This replica's requests at one attention shard: a connection that is made again and again, requests on their way
there, and deltas back. Knows nothing about Ray."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from isotherm.cluster.api.engine_client import HELD_UP_SECONDS, hand_over
from isotherm.cluster.errors import one_line
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest
from isotherm.cluster.within import within

# Deltas that are handed out in one turn of the event loop. Each costs it a quarter of a millisecond further on, and
# gRPC takes in one new request a turn: with all of them at once new requests would wait for seconds.
HANDED_OUT = 8
PING_PERIOD = 5.0  # seconds between signs of life; shards give up on a replica that is silent for several of these
OPEN_SECONDS = 30.0  # in which a shard must have opened a stream
SUBMIT_SECONDS = 40.0  # at least, in which a shard must have answered each call: see `patience`
SILENT_SECONDS = HELD_UP_SECONDS + 0.3  # in which a shard says what holds it up, else it is itself what does


def patience(hangs_after: float) -> float | None:
    """Seconds in which a shard must have answered each call, by those after which it counts as hung; None: any number,
    for what never hangs is waited for. One that cannot be heard has given up on this replica by then, and one that
    hangs has been ended, so that what hung it is known."""
    return max(SUBMIT_SECONDS, 2 * hangs_after) if hangs_after else None


class Shard(Protocol):
    """One attention shard, from afar. Raises WorkerGoneError where it is not there any more."""

    def stream(self, connection: str) -> AsyncGenerator[list[Delta], None]: ...

    async def submit(self, connection: str, requests: list[GenerationRequest], aborts: list[str]) -> None: ...

    async def held_up(self, seconds: float) -> str:
        """Empty when the rows of a request would get through there; else, after so many seconds, why not."""


class Connection:
    """This replica's requests at one shard. Each time that it is connected it has a new id there.

    Where the shard is lost, each request is told what that says about it. LOST: the shard had it, so it may be the
    cause; that is, the shard has acknowledged it, or had answered a question just before it was sent. MISSED: neither
    is so, and the shard may have been dead by then. MOVED: it was not sent. Suspects are always sent after such a
    question. So where many shards die at once nobody is LOST at one that was dead already, and a request that ends a
    shard before any acknowledgement is MISSED once, and LOST from then on. `hangs_after`: as ShardLimits has it."""

    def __init__(self, name: str, hangs_after: Callable[[], float]):
        self.name, self._hangs_after = name, hangs_after
        self.is_open = False
        self.families: Counter[str] = Counter()  # how many of the open requests are of one
        self._streams: dict[str, asyncio.Queue[Delta]] = {}  # open requests
        self._sent: set[str] = set()  # those of them that the shard has been sent, or is next
        # Those of them that are in the call under way, and what they are told if the shard is lost before it answers
        self._under_way: dict[str, FinishReason] = {}
        self._asks_first = False  # a suspect is among the requests to be sent
        self._requests: list[GenerationRequest] = []  # to be sent
        self._aborts: list[str] = []  # to be sent
        self._wake = asyncio.Event()
        self._shard: Shard | None = None  # while it is open

    async def held_up(self) -> str:
        """Empty when a request would get on at the shard; else why not."""
        if (shard := self._shard) is None:
            return f"{self.name} cannot be reached"
        asked = asyncio.ensure_future(shard.held_up(HELD_UP_SECONDS))
        if not (await asyncio.wait([asked], timeout=SILENT_SECONDS))[0]:
            asked.cancel()
            return f"{self.name} does not answer"
        try:
            return asked.result()
        except WorkerGoneError as error:
            return f"{self.name} is gone: {one_line(error)}"

    @property
    def load(self) -> int:
        return len(self._streams)

    async def attempt(self, request: GenerationRequest, is_suspect: bool = False) -> AsyncGenerator[Delta, None]:
        """The request's deltas from this shard. Left early, it is aborted there."""
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._streams[request.id] = queue
        self.families[request.family] += 1
        self._requests.append(request)
        self._asks_first |= is_suspect
        self._wake.set()
        if not self.is_open:  # closed since it was chosen
            self._end(WorkerGoneError(), {request.id})
        finished = False
        try:
            while not finished:
                delta = await queue.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self.families[request.family] -= 1
            if not self.families[request.family]:
                del self.families[request.family]
            if self._streams.get(request.id) is queue:
                del self._streams[request.id]
                if request.id in self._sent:
                    self._sent.discard(request.id)
                    if not finished:
                        self._aborts.append(request.id)
                        self._wake.set()
                else:
                    self._requests = [r for r in self._requests if r is not request]

    async def run(self, shard: Shard) -> str:
        """Open a stream and carry requests and deltas until it ends → why. Every request that is left then goes
        elsewhere. Raises what the shard raises."""
        connection = uuid.uuid4().hex
        ending: BaseException | None = None
        try:
            async with aclosing(shard.stream(connection)) as lists:
                await within(OPEN_SECONDS, anext(lists))  # the first one is the greeting
                self.is_open, self._shard = True, shard
                receiving = asyncio.ensure_future(self._receive(lists))
                sending = asyncio.ensure_future(self._send(shard, connection))
                try:
                    await asyncio.wait({receiving, sending}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self.is_open, self._shard = False, None
                    for task in (receiving, sending):
                        task.cancel()
                    results = await asyncio.gather(receiving, sending, return_exceptions=True)
            errors = [r for r in results if isinstance(r, Exception)]
            for error in sorted(errors, key=lambda e: not isinstance(e, WorkerGoneError)):
                raise error
            return "the shard has closed it"
        except StopAsyncIteration:
            return "the shard has closed it"
        except TimeoutError:  # it may live, and cannot be heard
            return "the shard does not answer"
        except BaseException as error:
            ending = error
            raise
        finally:
            self._end(ending, set(self._streams))

    def _end(self, ending: BaseException | None, requests: set[str]) -> None:
        """Have requests go elsewhere. The loss of a shard speaks against those that it had."""
        gone = isinstance(ending, WorkerGoneError)
        for request_id in requests:
            lost = self._under_way.get(request_id, FinishReason.LOST)
            reason = lost if gone and request_id in self._sent else FinishReason.MOVED
            self._streams.pop(request_id).put_nowait(Delta(request_id, 0, finish_reason=reason))
            self._sent.discard(request_id)
        self._requests = [r for r in self._requests if r.id not in requests]
        self._aborts.clear()

    async def _receive(self, lists: AsyncGenerator[list[Delta], None]) -> None:
        async for deltas in lists:
            for i, delta in enumerate(deltas, 1):
                if i % HANDED_OUT == 0:
                    await asyncio.sleep(0)
                queue = self._streams.get(delta.request_id)
                if queue is not None and delta.request_id in self._sent and not hand_over(delta, queue):
                    self._give_up(delta.request_id)

    def _give_up(self, request_id: str) -> None:
        """End a request whose deltas nobody reads."""
        del self._streams[request_id]
        self._sent.discard(request_id)
        self._aborts.append(request_id)
        self._wake.set()

    async def _send(self, shard: Shard, connection: str) -> None:
        """Send new requests and aborts, in one call all that came since the last, and a sign of life now and then.

        Never from the task of an HTTP request: when a client goes away Serve cancels that task together with the Ray
        calls it has made, so an abort sent from there would be lost.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                await within(PING_PERIOD, self._wake.wait())
            self._wake.clear()
            requests, self._requests = self._requests, []
            aborts, self._aborts = self._aborts, []
            asks, self._asks_first = self._asks_first, False
            ids = {request.id for request in requests}
            self._sent |= ids
            if asks:
                self._under_way = dict.fromkeys(ids, FinishReason.MOVED)
                await self._submit(shard, connection, [], [])
            self._under_way = {} if asks else dict.fromkeys(ids, FinishReason.MISSED)
            await self._submit(shard, connection, requests, aborts)
            self._under_way = {}

    async def _submit(
        self, shard: Shard, connection: str, requests: list[GenerationRequest], aborts: list[str]
    ) -> None:
        seconds, call = patience(self._hangs_after()), shard.submit(connection, requests, aborts)
        await (call if seconds is None else within(seconds, call))
