"""Deltas on their way to ingress replicas, and replicas that fall silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from isotherm.actors.attention.delivery import LOOK, SILENCE, Delivery, UnknownConnectionError
from isotherm.actors.attention.outbox import FLUSH, LONGEST_FLUSH
from isotherm.cluster.messages.requests import Delta, FinishReason


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Replica:
    """Reads its stream as it comes."""

    def __init__(self, delivery: Delivery, name: str):
        self.got: list[Delta] = []
        self.lists = 0
        self.task = asyncio.ensure_future(self._read(delivery, name))

    async def _read(self, delivery: Delivery, name: str) -> None:
        async for deltas in delivery.stream(name):
            self.got += deltas
            self.lists += 1


def play(act: Callable[[Delivery, Clock, list[str]], Awaitable[None]]) -> None:
    async def go() -> None:
        clock, aborted = Clock(), []
        await act(Delivery(aborted.append, clock), clock, aborted)

    asyncio.run(go())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.005)


def test_each_replica_gets_its_own_deltas():
    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        a, b = Replica(delivery, "a"), Replica(delivery, "b")
        await settle()
        assert (a.lists, a.got) == (1, [])  # the greeting
        delivery.expect("a", "r1")
        delivery.expect("b", "r2")
        delivery.publish([Delta("r1", 0, (7,)), Delta("r2", 0, (8,), FinishReason.LENGTH)])
        await settle()
        assert [d.token_ids for d in a.got] == [(7,)] and [d.token_ids for d in b.got] == [(8,)]
        assert delivery.open_ids() == ["r1"] and not delivery.is_empty and delivery.tokens == 2
        assert delivery.owns("a", "r1") and not delivery.owns("b", "r1")
        delivery.publish([Delta("r1", 1, (), FinishReason.ABORT)])
        clock.now += 1
        await settle()
        assert delivery.is_empty

    play(act)


def test_a_silent_replicas_stream_ends_and_its_requests_are_aborted():
    """It may only have been stopped: a stream that never ends would be waited for for ever."""

    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        silent, other = Replica(delivery, "silent"), Replica(delivery, "other")
        await settle()
        for connection, request in ("silent", "r1"), ("silent", "r2"), ("other", "r3"):
            delivery.expect(connection, request)
        for _ in range(int(SILENCE / LOOK) + 1):
            clock.now += LOOK
            delivery.hear("other")
            delivery.close_silent()
        await settle()
        assert aborted == ["r1", "r2"] and silent.task.done() and not other.task.done()
        with pytest.raises(UnknownConnectionError):
            delivery.hear("silent")
        again = Replica(delivery, "again")
        await settle()
        delivery.expect("again", "r1")
        ended = [Delta(request, 0, finish_reason=FinishReason.ABORT) for request in aborted]
        delivery.publish([*ended, Delta("r1", 3, (9,))])
        await settle()
        assert [d.start for d in again.got] == [3]

    play(act)


def test_what_is_said_of_a_request_before_it_was_resubmitted_is_not_told_to_the_new_connection():
    """Of a step that stood so long that its replica fell silent, and of the abort that was waiting behind it."""

    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        first = Replica(delivery, "first")
        await settle()
        delivery.expect("first", "r")
        for _ in range(int(SILENCE / LOOK) + 1):
            clock.now += LOOK
            delivery.close_silent()
        assert aborted == ["r"]
        second = Replica(delivery, "second")
        await settle()
        delivery.expect("second", "r")
        assert delivery.owns("second", "r") and delivery.open_ids() == ["r"]
        delivery.publish([Delta("r", 7, (1,)), Delta("r", 0, finish_reason=FinishReason.ABORT), Delta("r", 7, (1,))])
        await settle()
        clock.now += 1
        delivery.publish([Delta("r", 8, (2,), FinishReason.LENGTH)])
        await settle()
        assert [(d.start, d.token_ids, d.finish_reason) for d in second.got] == [
            (7, (1,), None),
            (8, (2,), FinishReason.LENGTH),
        ]
        assert first.got == [] and first.task.done() and delivery.is_empty

    play(act)


def test_the_old_connection_of_a_resubmitted_request_aborts_it_no_more():
    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        replicas = Replica(delivery, "first"), Replica(delivery, "second")
        await settle()
        for connection in "first", "second":
            delivery.expect(connection, "r")
        for _ in range(int(SILENCE / LOOK) + 1):
            clock.now += LOOK
            delivery.hear("second")
            delivery.close_silent()
        await settle()
        assert [one.task.done() for one in replicas] == [True, False] and aborted == []
        assert delivery.longest_wait() > SILENCE
        delivery.publish([Delta("r", 0, finish_reason=FinishReason.ABORT)])  # of the first
        await settle()
        assert delivery.longest_wait() > SILENCE and delivery.owns("second", "r")

    play(act)


def test_a_stream_that_is_left_closes_its_connection():
    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        replica, other = Replica(delivery, "a"), Replica(delivery, "b")
        await settle()
        delivery.expect("a", "r1")
        delivery.expect("b", "r2")
        replica.task.cancel()
        await settle()
        assert aborted == ["r1"] and not other.task.done()
        with pytest.raises(UnknownConnectionError):
            delivery.hear("a")

    play(act)


def test_nobody_is_to_blame_where_this_process_stood_still():
    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        replica = Replica(delivery, "a")
        await settle()
        delivery.expect("a", "r1")
        clock.now += 10 * SILENCE
        assert delivery.close_silent() == []
        clock.now += LOOK
        delivery.hear("a")
        assert delivery.close_silent() == [] and not replica.task.done()

    play(act)


def test_a_connection_must_be_open_before_requests_are_sent():
    async def act(delivery: Delivery, clock: Clock, aborted: list[str]) -> None:
        with pytest.raises(UnknownConnectionError, match="connection x is not open at this shard"):
            delivery.hear("x")

    play(act)


def test_many_streams_are_looked_at_as_seldom_as_they_are_sent_and_first_tokens_all_the_same():
    """Each look takes Python's lock from the thread that steps."""

    async def go() -> None:
        delivery = Delivery(lambda request_id: None)
        replica, looks = Replica(delivery, "a"), 0
        route = delivery._route

        def counted(deltas: list[Delta], now: float) -> None:
            nonlocal looks
            looks += 1
            route(deltas, now)

        delivery._route = counted  # type: ignore[method-assign]
        await settle()
        names = [f"r{i}" for i in range(16)]
        for name in (*names, "new"):
            delivery.expect("a", name)
        begin = time.monotonic()
        for step in range(100):
            delivery.publish([Delta(name, step, (7,)) for name in names])
            await asyncio.sleep(0.003)
        spent = time.monotonic() - begin
        assert looks <= spent / LONGEST_FLUSH + 5
        while delivery._next_look is None or delivery._next_look.when() < asyncio.get_running_loop().time() + 3 * FLUSH:
            delivery.publish([Delta(name, step + 1, (7,)) for name in names])
            step += 1
            await asyncio.sleep(0.001)
        delivery.publish([Delta("new", 0, (9,))])
        await asyncio.sleep(2 * FLUSH)
        assert any(delta.request_id == "new" for delta in replica.got)

    asyncio.run(go())
