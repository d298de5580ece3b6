"""An ingress replica and its shards, without Ray: shards that die, close their streams, are not there any more, or are
killed by a request."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_shards import EXPECTED, FakeCluster, FakeShard, ask, play, play_with_room, request, run_until, tokens
from virtual_time import run_in_virtual_time

from isotherm.cluster.api.engine_client import EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.messages.membership import ShardLimits
from isotherm.cluster.messages.requests import (
    Delta,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    SamplingParams,
    TokenLogprobs,
)
from isotherm.cluster.routing import shard_client
from isotherm.cluster.routing.journey import Journey
from isotherm.cluster.routing.shard_client import ShardClient


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(shard_client, "RECONNECT", (0.001, 0.01))
    monkeypatch.setattr(shard_client, "ADMISSION_SECONDS", 5.0)
    monkeypatch.setattr(shard_client, "RESUBMIT_SECONDS", 5.0)


def scoring(name: str) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(30)), SamplingParams(3, prompt_logprobs=0))


def scores(start: int, stop: int) -> PromptLogprobs:
    return PromptLogprobs(start, tuple(TokenLogprobs(-float(i)) for i in range(start, stop)))


def test_a_request_gets_its_tokens():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        work = ask(client, request("a"), request("b"))
        await run_until(cluster, work)
        assert [tokens(task.result()) for task in work] == [EXPECTED, EXPECTED]

    play(lambda: FakeCluster(2), act)


def test_a_family_goes_to_one_shard_as_long_as_that_can_run_one_more():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        siblings = [replace(request(f"r{i}"), family="f") for i in range(6)]
        work = ask(client, request("a"), *siblings, request("b"), request("c"))
        await run_until(cluster, work)
        assert all(tokens(task.result()) == EXPECTED for task in work)
        homes = [shard for shard in cluster.shards.values() if any("r0" in ids for ids in shard.submitted)]
        (home,) = homes
        there = [name for ids in home.submitted for name in ids]
        # The first of the family went where there was least; its fifth would have waited there.
        assert [name for name in there if name.startswith("r")] == ["r0", "r1", "r2", "r3"]
        assert all(not c.families for c in client._connections.values())

    play_with_room(2, ShardLimits(4096, requests=8, max_sequences=4), act)


def test_each_score_of_a_prompt_is_given_out_once_whatever_is_lost():
    """Scores come in parts, and a shard dies between two of them: the next is told where they ended."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        work = ask(client, scoring("a"))
        await asyncio.sleep(0.02)
        (shard,) = cluster.shards.values()
        (lists,) = shard.lists.values()
        lists.put_nowait([Delta("a", 0, prompt=scores(1, 9))])
        await asyncio.sleep(0.02)
        shard.die()
        cluster.replace_the_dead()
        while not any(shard.running for shard in cluster.shards.values()):
            await asyncio.sleep(0.002)
        (shard,) = cluster.shards.values()
        assert shard.running["a"][1] == scoring("a").resumed((), 8)
        (lists,) = shard.lists.values()
        lists.put_nowait([Delta("a", 0, prompt=scores(9, 30))])
        await run_until(cluster, work)
        told = [one for delta in work[0].result() if delta.prompt is not None for one in delta.prompt.tokens]
        assert told == list(scores(1, 30).tokens) and tokens(work[0].result()) == [100, 101, 102]

    play(lambda: FakeCluster(1), act)


def test_a_request_under_which_a_shard_was_lost_is_cleared_by_scores_of_its_prompt():
    """It may have no token until it is done, or none at all: other suspects do not wait for that."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        work = ask(client, scoring("a"), scoring("b"))
        await asyncio.sleep(0.02)
        (shard,) = cluster.shards.values()
        shard.die()
        cluster.replace_the_dead()
        (shard,) = cluster.shards.values()
        while not shard.running:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        (first,), (lists,) = shard.running, shard.lists.values()
        lists.put_nowait([Delta(first, 0, prompt=scores(1, 9))])
        while len(shard.running) < 2:
            await asyncio.sleep(0.002)
        await run_until(cluster, work)
        assert [tokens(task.result()) for task in work] == [[100, 101, 102]] * 2

    play(lambda: FakeCluster(1), act)


def test_losses_count_in_succession_without_a_token_or_a_score():
    journey = Journey(scoring("a"))
    for start in (1, 5, 9):
        assert journey.take(Delta("a", 0, prompt=scores(start, start + 4))) and not journey.is_suspect
        assert not journey.take(Delta("a", 0, finish_reason=FinishReason.LOST))
        assert journey.is_suspect and journey.verdict(2) is None
    assert not journey.take(Delta("a", 0, finish_reason=FinishReason.LOST))
    assert journey.verdict(2) is not None


def test_a_gap_in_the_scores_of_a_prompt_is_not_passed_over():
    journey = Journey(scoring("a"))
    assert journey.take(Delta("a", 0, prompt=scores(1, 4)))
    for start in (1, 5):
        with pytest.raises(RuntimeError, match=f"prompt token {start} of request a came where 4 was due"):
            journey.take(Delta("a", 0, prompt=scores(start, start + 2)))


def test_a_shard_that_is_named_and_gone_does_not_end_the_watch_over_the_membership():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        cluster.publish("attention-gone", *cluster.shards)
        await asyncio.sleep(0.02)
        cluster.shards["attention-9"] = FakeShard("attention-9")
        cluster.publish("attention-9")
        await asyncio.sleep(0.05)
        work = ask(client, request("a"))
        await run_until(cluster, work)
        assert tokens(work[0].result()) == EXPECTED and cluster.shards["attention-9"].submitted == [("a",)]

    play(lambda: FakeCluster(1), act)


def test_streams_go_on_where_a_shard_is_lost():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        work = ask(client, *(request(f"r{i}") for i in range(8)))
        await run_until(
            cluster, work, lambda step: next(iter(cluster.shards.values())).die() if step in (2, 30) else None
        )
        assert all(tokens(task.result()) == EXPECTED for task in work)

    play(lambda: FakeCluster(2), act)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_request_that_takes_its_shards_with_it_ends_alone(shards: int):
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        others = ask(client, *(request(f"r{i}") for i in range(12)))
        poison = ask(client, request("poison"))
        await run_until(cluster, others + poison)
        assert all(tokens(task.result()) == EXPECTED for task in others)
        (end,) = poison[0].result()
        assert end.finish_reason is FinishReason.ERROR and "2 attention shards in succession were lost" in end.error
        assert cluster.lost == 2

    play(lambda: FakeCluster(shards), act)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_request_that_takes_its_shards_with_it_before_they_acknowledge_it_ends_alone(shards: int):
    """The first of them may have been dead before: that one does not count."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        others = ask(client, *(request(f"r{i}") for i in range(12)))
        poison = ask(client, request("instant poison"))
        await run_until(cluster, others + poison)
        assert all(tokens(task.result()) == EXPECTED for task in others)
        (end,) = poison[0].result()
        assert end.finish_reason is FinishReason.ERROR and "2 attention shards in succession were lost" in end.error
        assert cluster.lost == 3

    play(lambda: FakeCluster(shards), act)


@pytest.mark.parametrize("shards", [2, 5])
@pytest.mark.parametrize("begun", [True, False])
def test_a_shard_that_was_dead_before_speaks_against_no_request(shards: int, begun: bool):
    """All of them are killed at once, and this replica hears of one after the other."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        killed = list(cluster.shards.values())
        work = ask(client, *(request(f"r{i}") for i in range(16))) if begun else []
        await asyncio.sleep(0.02)
        for shard in killed:
            shard.tick()
            shard.dead = True
            shard.running.clear()
        if not begun:
            work = ask(client, *(request(f"r{i}") for i in range(16)))
        for shard in killed:
            await asyncio.sleep(0.05)
            shard.die()
        cluster.replace_the_dead()
        await run_until(cluster, work)
        assert [tokens(task.result()) for task in work] == [EXPECTED] * 16

    play_with_room(shards, ShardLimits(4096), act)


def test_a_loss_that_may_have_come_before_a_request_is_not_counted_with_the_next():
    """New requests go to a shard that is dead already, and the next one is killed when it has one of them."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        (shard,) = cluster.shards.values()
        shard.dead = True
        work = ask(client, *(request(f"r{i}") for i in range(4)))
        await asyncio.sleep(0.02)
        shard.die()
        cluster.replace_the_dead()
        (shard,) = cluster.shards.values()
        while not shard.running:
            await asyncio.sleep(0.001)
        assert len(shard.running) == 1, "they are suspects"
        shard.die()
        await run_until(cluster, work)
        assert [tokens(task.result()) for task in work] == [EXPECTED] * 4

    play(lambda: FakeCluster(1), act)


def test_a_loss_counts_no_more_once_there_is_a_token():
    """Ten losses, with progress in between: the machines are to blame."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        work = ask(client, request("long", tokens=40))
        killed: set[int] = set()

        def kill(step: int) -> None:
            (shard,) = cluster.shards.values()
            (at,) = [at for _, _, at in shard.running.values()] or [0]
            if at and at % 4 == 0 and at not in killed:
                killed.add(at)
                shard.die()

        await run_until(cluster, work, kill)
        assert tokens(work[0].result()) == [100 + i for i in range(40)] and cluster.lost >= 8

    play(lambda: FakeCluster(1), act)


def test_a_shard_that_leaves_the_membership_finishes_what_it_has_and_may_come_back():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        first = ask(client, request("a"))
        await asyncio.sleep(0.01)
        cluster.publish()
        await asyncio.sleep(0.01)
        assert client.not_ready() == "none is left"
        await run_until(cluster, first)
        assert tokens(first[0].result()) == EXPECTED
        second = ask(client, request("b"))
        await asyncio.sleep(0.05)
        assert not second[0].done()
        cluster.publish(*cluster.shards)
        await run_until(cluster, second)
        assert tokens(second[0].result()) == EXPECTED
        assert len(next(iter(cluster.shards.values())).lists) == 1  # still the same connection

    play(lambda: FakeCluster(1), act)


def test_a_stream_ends_with_an_error_where_no_shard_comes_back(monkeypatch):
    monkeypatch.setattr(shard_client, "RESUBMIT_SECONDS", 0.1)
    monkeypatch.setattr(shard_client, "ADMISSION_SECONDS", 0.1)

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        begun = ask(client, request("a"))
        await asyncio.sleep(0.01)
        (shard,) = cluster.shards.values()
        shard.tick()
        await asyncio.sleep(0.01)
        waiting = ask(client, request("b"))
        await asyncio.sleep(0.01)
        shard.die()
        await run_until(cluster, begun)
        assert tokens(begun[0].result()) == [100]
        assert begun[0].result()[-1].finish_reason is FinishReason.ERROR
        with pytest.raises(EngineUnavailableError):
            await waiting[0]

    play(lambda: FakeCluster(1, replacing=False), act)


def test_a_client_that_goes_away_has_its_request_aborted():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        (shard,) = cluster.shards.values()
        work = ask(client, request("a", tokens=1000))
        await asyncio.sleep(0.01)
        assert "a" in shard.running
        work[0].cancel()
        while shard.running:
            await asyncio.sleep(0.002)
        assert shard.aborted == ["a"]

    play(lambda: FakeCluster(1), act)


def test_a_full_shard_refuses_what_is_new_and_nothing_else():
    """Of ten requests four are let in; when one of the two shards is lost, the other takes its requests too."""

    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        for shard in cluster.shards.values():
            shard.room = 2
        work = ask(client, *(request(f"r{i}") for i in range(10)))
        deadline = asyncio.get_running_loop().time() + 5
        while sum(task.done() for task in work) < 6 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # no more than these
        refused = [task for task in work if task.done()]
        assert len(refused) == 6 and all(isinstance(task.exception(), EngineOverloadedError) for task in refused)
        cluster.replacing = False
        next(iter(cluster.shards.values())).die()  # before any token: they are waiting
        cluster.replace_the_dead()
        left = [task for task in work if not task.done()]
        await run_until(cluster, left)
        assert [tokens(task.result()) for task in left] == [EXPECTED] * 4

    play(lambda: FakeCluster(2), act)


def test_there_is_room_for_as_many_as_the_shards_take():
    async def act(cluster: FakeCluster, client: ShardClient) -> None:
        while client.capacity() == 256:
            await asyncio.sleep(0.001)
        assert client.capacity() == 512
        cluster.publish()
        while client.capacity() == 512:
            await asyncio.sleep(0.001)
        assert client.capacity() == 256, "as for one that is on its way"

    async def go() -> None:
        cluster = FakeCluster(2)
        cluster.limits = ShardLimits(4096, requests=256)
        client = ShardClient(cluster, 300, cluster.limits)
        client.start()
        await asyncio.wait_for(act(cluster, client), 20)
        await client.background.close()

    run_in_virtual_time(go())
