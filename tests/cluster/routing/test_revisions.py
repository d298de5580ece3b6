"""An ingress replica while another model is rolled out: which shard may have which request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest
from fake_shards import FakeCluster, FakeShard, collect, play, request, tokens

from isotherm.cluster.api.engine_client import EngineUnavailableError
from isotherm.cluster.messages.membership import Membership, ShardLimits
from isotherm.cluster.messages.requests import FinishReason, GenerationRequest
from isotherm.cluster.routing import shard_client
from isotherm.cluster.routing.shard_client import ShardClient

OLD, NEW = "isotherm-old", "isotherm-new"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(shard_client, "RECONNECT", (0.001, 0.01))


class Rolled(FakeCluster):
    """Revision 0 with the weights OLD serves, attention-0; attention-1 is there for another."""

    def __init__(self) -> None:
        super().__init__(2)
        self.revision, self.others, self.named = 0, {}, ("attention-0",)
        self.fingerprints = [OLD, NEW]  # by revision

    def tell(self, revision: int, named: tuple[str, ...], others: Mapping[int, tuple[str, ...]]) -> None:
        self.revision, self.others = revision, dict(others)
        self.publish(*named)

    def tell_of_other_values(self, longest: int) -> None:
        """attention-1 serves, with the same weights, and requests of up to so many tokens."""
        self.fingerprints, self.limits = [OLD, OLD], ShardLimits(longest, requests=7)
        self.tell(1, ("attention-1",), {0: ("attention-0",)})

    async def watch(self, known_version: int) -> Membership:
        told = await super().watch(known_version)
        fingerprint = self.fingerprints[self.revision]
        return replace(told, system_fingerprint=fingerprint, revision=self.revision, others=self.others)


def bound(name: str, client: ShardClient) -> GenerationRequest:
    """As the front door makes it: of the weights that its reply names."""
    return replace(request(name), fingerprint=client.system_fingerprint)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def finish(work: asyncio.Task, *shards: FakeShard):
    while not work.done():
        for shard in shards:
            shard.tick()
        await asyncio.sleep(0.002)
    return work.result()


def test_one_that_is_about_to_come_takes_nothing_and_is_connected_to():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        cluster.tell(0, ("attention-0",), {1: ("attention-1",)})
        await until(lambda: cluster.shards["attention-1"].lists)
        for i in range(4):
            await finish(asyncio.ensure_future(collect(client, bound(f"r{i}", client))), cluster.shards["attention-0"])
        assert cluster.shards["attention-1"].submitted == [] and client.capacity() == client._limits.requests

    play(Rolled, act)


def test_a_stream_ends_where_it_began_and_new_ones_go_to_the_new():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        old, new = cluster.shards["attention-0"], cluster.shards["attention-1"]
        first = asyncio.ensure_future(collect(client, bound("first", client)))
        late = bound("late", client)  # its reply names the old weights, and it is on its way
        await until(lambda: old.running)
        cluster.tell(1, ("attention-1",), {0: ("attention-0",)})
        await until(lambda: client.system_fingerprint == NEW)
        others = [asyncio.ensure_future(collect(client, r)) for r in (late, bound("second", client))]
        for work in (first, *others):
            assert tokens(await finish(work, old, new)) == [100, 101, 102, 103, 104, 105]
        assert [name for names in old.submitted for name in names] == ["first", "late"]
        assert new.submitted == [("second",)]

    play(Rolled, act)


def test_a_stream_whose_shard_is_lost_waits_for_one_with_its_weights():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        old, new = cluster.shards["attention-0"], cluster.shards["attention-1"]
        first = asyncio.ensure_future(collect(client, bound("first", client)))
        await until(lambda: old.running)
        old.tick()
        cluster.tell(1, ("attention-1",), {0: ("attention-0",)})
        await until(lambda: client.system_fingerprint == NEW)
        old.die()
        cluster.tell(1, ("attention-1",), {0: ()})
        await asyncio.sleep(0.1)
        assert not first.done() and new.submitted == []
        healed = cluster.shards["attention-9"] = FakeShard("attention-9")
        cluster.tell(1, ("attention-1",), {0: ("attention-9",)})
        assert tokens(await finish(first, healed, new)) == [100, 101, 102, 103, 104, 105]
        assert healed.submitted == [("first",)] and new.submitted == []

    play(Rolled, act)


def test_where_the_weights_are_gone_it_is_said_at_once():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        old = cluster.shards["attention-0"]
        begun, late = asyncio.ensure_future(collect(client, bound("begun", client))), bound("late", client)
        await until(lambda: old.running)
        old.tick()
        await asyncio.sleep(0.01)
        cluster.tell(1, ("attention-1",), {})
        await until(lambda: client.system_fingerprint == NEW)
        old.die()
        last = (await asyncio.wait_for(begun, 1))[-1]
        assert last.finish_reason is FinishReason.ERROR and OLD in last.error
        with pytest.raises(EngineUnavailableError, match="not served any more"):
            await asyncio.wait_for(collect(client, late), 1)
        assert cluster.shards["attention-1"].submitted == []

    play(Rolled, act)


# --- the same weights, with other values of workers -----------------------------------------------


def long(name: str, client: ShardClient) -> GenerationRequest:
    """As it may be where a request has up to 4096 tokens."""
    asked = bound(name, client)
    return replace(asked, prompt=tuple(range(4000)), params=replace(asked.params, max_tokens=6))


def test_what_others_take_is_the_front_doors_limit_from_then_on():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        assert (client.max_model_len, client.system_fingerprint) == (4096, OLD)
        cluster.tell_of_other_values(64)
        await until(lambda: client.max_model_len == 64)
        await until(lambda: client._serving())
        assert client.capacity() == 7 and client.system_fingerprint == OLD

    play(Rolled, act)


def test_a_stream_with_the_same_bits_goes_on_at_the_new_shards_where_its_own_is_lost():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        old, new = cluster.shards["attention-0"], cluster.shards["attention-1"]
        first = asyncio.ensure_future(collect(client, bound("first", client)))
        await until(lambda: old.running)
        old.tick()
        cluster.tell_of_other_values(64)
        await until(lambda: client.max_model_len == 64 and client._serving())
        old.die()
        assert tokens(await finish(first, new)) == [100, 101, 102, 103, 104, 105]
        assert new.submitted == [("first",)]

    play(Rolled, act)


def test_one_that_is_too_long_for_the_new_shards_waits_for_one_with_its_own_values():
    """They would end it early, and with the same weights only its length tells the two apart."""

    async def act(cluster: Rolled, client: ShardClient) -> None:
        old, new = cluster.shards["attention-0"], cluster.shards["attention-1"]
        first, late = asyncio.ensure_future(collect(client, long("first", client))), long("late", client)
        await until(lambda: old.running)
        old.tick()
        cluster.tell_of_other_values(64)
        await until(lambda: client.max_model_len == 64 and client._serving())
        second = asyncio.ensure_future(collect(client, late))  # it was let in before, and is on its way
        short = asyncio.ensure_future(collect(client, bound("short", client)))
        await until(lambda: len(old.running) == 2 and new.running)
        old.die()
        cluster.tell(1, ("attention-1",), {0: ()})
        await asyncio.sleep(0.1)
        assert not first.done() and not second.done()
        healed = cluster.shards["attention-9"] = FakeShard("attention-9")
        cluster.tell(1, ("attention-1",), {0: ("attention-9",)})
        for work in (first, second, short):
            assert tokens(await finish(work, healed, new)) == [100, 101, 102, 103, 104, 105]
        assert {name for names in healed.submitted for name in names} == {"first", "late"}
        assert new.submitted == [("short",)]

    play(Rolled, act)


def test_one_that_is_too_long_for_all_that_there_are_is_told_why_at_once():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        late = long("late", client)
        cluster.tell_of_other_values(64)
        await until(lambda: client.max_model_len == 64 and client._serving())
        cluster.tell(1, ("attention-1",), {})
        await until(lambda: "attention-0" not in client._named())
        with pytest.raises(EngineUnavailableError, match="up to 4096 tokens, and those that serve take fewer"):
            await asyncio.wait_for(collect(client, late), 1)

    play(Rolled, act)


def test_while_the_new_shards_are_being_replaced_the_ones_before_help_out():
    async def act(cluster: Rolled, client: ShardClient) -> None:
        old = cluster.shards["attention-0"]
        cluster.tell_of_other_values(64)
        await until(lambda: client.max_model_len == 64 and client._serving())
        cluster.tell(1, (), {0: ("attention-0",)})
        await until(lambda: client.not_ready() is not None)
        asked = asyncio.ensure_future(collect(client, bound("asked", client)))
        assert tokens(await finish(asked, old)) == [100, 101, 102, 103, 104, 105]

    play(Rolled, act)
