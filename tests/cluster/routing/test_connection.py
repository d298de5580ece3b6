"""What becomes of requests where a replica and a shard do not hear each other, and whether requests get on."""

from __future__ import annotations

import asyncio

import pytest
from fake_shards import (
    EXPECTED,
    FakeCluster,
    FakeShard,
    ask,
    collect,
    play,
    play_with_room,
    request,
    run_until,
    tokens,
)

from isotherm.cluster.api import engine_client
from isotherm.cluster.api.engine_client import HELD_UP_SECONDS
from isotherm.cluster.messages.membership import Membership, ShardLimits
from isotherm.cluster.messages.requests import FinishReason
from isotherm.cluster.routing import connection as routing_connection
from isotherm.cluster.routing import shard_client
from isotherm.cluster.routing.connection import SILENT_SECONDS
from isotherm.cluster.routing.shard_client import ShardClient


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(shard_client, "RECONNECT", (0.001, 0.01))


def test_a_request_whose_deltas_nobody_reads_ends_at_its_shard_too(monkeypatch):
    monkeypatch.setattr(engine_client, "MOST_UNREAD", 5)

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        (shard,) = cluster.shards.values()
        stream = client.generate(request("a", 50))
        first = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
        other = asyncio.ensure_future(collect(client, request("b", 50)))
        for _ in range(30):
            await asyncio.sleep(0.002)
            shard.tick()
        await first
        *_, last = [delta async for delta in stream]
        assert last.finish_reason is FinishReason.ERROR and "too slowly" in last.error
        while "a" not in shard.aborted:
            await asyncio.sleep(0.002)
        await run_until(cluster, [other])
        assert len(tokens(other.result())) == 50, "others are read, and go on"
        (connection,) = client._connections.values()
        assert not connection._streams and not connection._sent and not connection.families

    play(lambda: FakeCluster(1), act)


def test_a_replica_that_was_silent_opens_another_stream_and_resubmits():
    """The shard has given up on this replica, which was stopped: every request goes on, from the tokens that it has."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        (shard,) = cluster.shards.values()
        work = ask(client, *(request(f"r{i}") for i in range(8)))
        await run_until(cluster, work, lambda step: shard.close_streams() if step == 3 else None)
        assert all(tokens(task.result()) == EXPECTED for task in work)
        assert client.not_ready() is None

    play(lambda: FakeCluster(1), act)


def test_a_connection_that_the_shard_does_not_know_is_made_anew():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        (shard,) = cluster.shards.values()
        shard.lists.clear()  # the shard forgot it, and its stream stays silent
        work = ask(client, request("a"))
        await run_until(cluster, work)
        assert tokens(work[0].result()) == EXPECTED

    play(lambda: FakeCluster(1), act)


def test_a_shard_that_cannot_be_heard_keeps_nobody(monkeypatch, caplog):
    """It lives, and the controller hears it: nobody else will say that it is gone. Nor is it lost: nobody is suspect of
    having ended it."""
    monkeypatch.setattr(routing_connection, "SUBMIT_SECONDS", 2.0)

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        parted, other = cluster.shards.values()
        work = ask(client, *(request(f"r{i}") for i in range(8)))

        def part(step: int) -> None:
            if step == 3:
                assert parted.running and other.running
                parted.parted = True
                work.extend(ask(client, request("late-0"), request("late-1")))

        await run_until(cluster, work, part)
        assert [tokens(task.result()) for task in work] == [EXPECTED] * 10
        courses = [delta.course for task in work for delta in task.result() if delta.course is not None]
        assert any(course.moved for course in courses) and not any(course.resumed for course in courses)
        assert client._serving() == [client._connections[other.name]]
        parted.parted = False
        while len(client._serving()) < 2:
            await asyncio.sleep(0.1)

    monkeypatch.setattr(routing_connection, "OPEN_SECONDS", 2.0)
    monkeypatch.setattr(routing_connection, "PING_PERIOD", 1.0)
    play_with_room(2, ShardLimits(4096, hangs_after=1.0), act)
    assert "Traceback" not in caplog.text and "the shard does not answer" in caplog.text


@pytest.mark.parametrize(("hangs_after", "moved"), [(1.0, True), (5.0, False), (0.0, False)])
def test_who_counts_as_hung_later_or_never_is_waited_for(monkeypatch, hangs_after: float, moved: bool):
    """`liveness.timeout` was 0 or 60, and yet a shard's requests went elsewhere after 40 s, by when nobody could know
    that they had hung it."""
    monkeypatch.setattr(routing_connection, "SUBMIT_SECONDS", 4.0)
    monkeypatch.setattr(routing_connection, "PING_PERIOD", 0.5)
    pause = 7.0

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        first, _ = cluster.shards.values()
        work = ask(client, request("a"), request("b"))

        async def part() -> None:
            first.parted = True
            await asyncio.sleep(pause)
            first.parted = False

        parting = asyncio.ensure_future(part())
        await asyncio.sleep(pause - 1.0)
        assert client._connections[first.name].is_open is not moved
        await parting
        await run_until(cluster, work)
        assert [tokens(task.result()) for task in work] == [EXPECTED] * 2
        courses = [delta.course for task in work for delta in task.result() if delta.course is not None]
        assert any(course.moved for course in courses) is moved

    play_with_room(2, ShardLimits(4096, hangs_after=hangs_after), act)


def test_a_controller_whose_answer_is_lost_is_asked_again(monkeypatch):
    monkeypatch.setattr(shard_client, "WATCH_SECONDS", 2.0)

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        watch, lost = cluster.watch, 0

        async def watch_or_wait(known: int) -> Membership:
            nonlocal lost
            answer = await watch(known)
            if known == answer.version - 1 and not lost:
                lost += 1
                await asyncio.Event().wait()
            return answer

        monkeypatch.setattr(cluster, "watch", watch_or_wait)
        cluster.publish(*cluster.shards)
        await asyncio.sleep(0.01)
        cluster.shards["attention-9"] = FakeShard("attention-9")
        cluster.publish("attention-9")
        await asyncio.sleep(5)
        assert lost == 1 and [connection.name for connection in client._serving()] == ["attention-9"]

    play(lambda: FakeCluster(1), act)


# --- whether requests get on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "stands, said, seconds",
    [
        ("", None, 0.0),
        ("attention-1 has waited for expert-0", "attention-1 has waited for expert-0", HELD_UP_SECONDS),
        ("without a word", "attention-1 does not answer", SILENT_SECONDS),
    ],
)
def test_requests_are_held_up_where_any_shard_holds_them_up(stands: str, said: str | None, seconds: float):
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        cluster.shards["attention-1"].stands = stands
        begin = asyncio.get_running_loop().time()
        assert await client.held_up() == said
        assert asyncio.get_running_loop().time() - begin == pytest.approx(seconds)

    play_with_room(2, ShardLimits(4096), act)


def test_a_shard_that_has_died_holds_requests_up_until_it_is_named_no_more():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        cluster.shards["attention-0"].dead = True
        assert "attention-0 is gone" in (await client.held_up() or "")
        cluster.shards["attention-0"].die()
        cluster.publish("attention-1")
        await asyncio.sleep(0.1)
        assert await client.held_up() is None

    play_with_room(2, ShardLimits(4096), act)
