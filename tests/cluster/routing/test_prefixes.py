"""Which shard a prompt's beginning is remembered at, and that requests go there while it pays."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from fake_shards import FakeCluster, collect, play_with_room

from isotherm.cluster.messages.membership import ShardLimits
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.routing.prefixes import GRAIN, HOLDERS, Prefixes
from isotherm.cluster.routing.shard_client import TOKENS_OF_A_REQUEST, ShardClient

SYSTEM = tuple(range(1000, 1000 + 4 * GRAIN))


def asked(name: str, prompt: tuple[int, ...], tenant: str = "", tokens: int = 1) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(tokens, 0.0), tenant=tenant)


def test_the_longest_beginning_of_each_shard_counts():
    prefixes = Prefixes()
    prefixes.sent(asked("a", (*SYSTEM, 1)), "one")
    prefixes.sent(asked("b", (*SYSTEM[: 2 * GRAIN], 1)), "two")
    assert prefixes.cached(asked("c", (*SYSTEM, 2))) == {"one": 4 * GRAIN, "two": 2 * GRAIN}
    assert prefixes.cached(asked("c", SYSTEM)) == {"one": 3 * GRAIN, "two": 2 * GRAIN}, "the last token is computed"
    assert prefixes.cached(asked("c", SYSTEM[:GRAIN])) == {}
    assert prefixes.cached(asked("c", (0, *SYSTEM))) == {}
    assert prefixes.cached(asked("c", (*SYSTEM, 2), tenant="another's")) == {}


def test_it_is_as_a_list_of_all_prompts_would_have_it():
    rng = random.Random(3)
    prefixes, sent = Prefixes(), list[tuple[str, tuple[int, ...], str]]()
    for i in range(300):
        tenant = rng.choice(["", "t"])
        prompt = tuple(rng.choice((1, 2)) for _ in range(rng.randint(0, 3)) for _ in range(GRAIN))
        prompt = tuple(v for at in range(0, len(prompt), GRAIN) for v in (prompt[at],) * GRAIN) + (7,) * rng.randint(
            0, 9
        )
        expected: dict[str, int] = {}
        for other_tenant, other, shard in sent:
            if other_tenant == tenant:
                common = 0
                while common < min(len(prompt), len(other)) - 1 and prompt[common] == other[common]:
                    common += 1
                if (tokens := common // GRAIN * GRAIN) > expected.get(shard, 0):
                    expected[shard] = tokens
        assert prefixes.cached(asked(f"r{i}", prompt, tenant)) == expected
        shard = rng.choice(["one", "two", "three"])
        prefixes.sent(asked(f"r{i}", prompt, tenant), shard)
        sent.append((tenant, prompt, shard))


def test_what_was_asked_longest_ago_is_forgotten():
    prefixes = Prefixes(most=4)
    first, second = (*SYSTEM[: 2 * GRAIN], 1), (*(9,) * 2 * GRAIN, 1)
    prefixes.sent(asked("a", first), "one")
    prefixes.sent(asked("b", second), "one")
    prefixes.sent(asked("c", first), "one")
    prefixes.sent(asked("d", (*(8,) * 2 * GRAIN, 1)), "one")
    assert prefixes.cached(asked("e", first)) == {"one": 2 * GRAIN}
    assert prefixes.cached(asked("e", second)) == {}


def served_by(requests: list[GenerationRequest], one_by_one: bool) -> list[str]:
    """Which of two shards, with room for eight each, each request went to: all at once, or the next one when the last
    that is for one token has ended."""

    async def act(cluster: FakeCluster, client: ShardClient) -> list[str]:
        short: list[asyncio.Task[object]] = []
        work: list[asyncio.Task[object]] = []
        for request in requests:
            work.append(asyncio.ensure_future(collect(client, request)))
            short += work[-1:] if request.params.max_tokens == 1 else []
            await asyncio.sleep(0.01)
            while not all(task.done() for task in (short if one_by_one else work if request is requests[-1] else ())):
                for shard in cluster.shards.values():
                    shard.tick()
                await asyncio.sleep(0.01)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        return [
            next(name for name, shard in cluster.shards.items() if any(request.id in ids for ids in shard.submitted))
            for request in requests
        ]

    return play_with_room(2, ShardLimits(4096, requests=16, max_sequences=8), act)


def test_a_conversation_stays_where_its_beginning_is_although_another_stream_runs_there():
    turns = [asked(f"a{i}", (*SYSTEM, *range(i * GRAIN), 1)) for i in range(3)]
    held = asked("held", (3,) * 10, tokens=1000)
    fresh = asked("fresh", (5,) * 3 * GRAIN)
    first, other, *later, elsewhere = served_by([turns[0], held, *turns[1:], fresh], one_by_one=True)
    assert other == first and later == [first, first] and elsewhere != first


def test_shards_that_have_gone_are_forgotten_in_time():
    prefixes, request = Prefixes(), asked("a", (*SYSTEM, 1))
    for i in range(100):
        prefixes.sent(request, f"shard-{i}")
    assert list(prefixes.cached(request)) == [f"shard-{i}" for i in range(100 - HOLDERS, 100)]


def test_a_beginning_weighs_as_many_requests_as_its_tokens_are_worth():
    """Then the other shard has it as well, and they share the rest."""
    requests = [asked(f"r{i}", (*SYSTEM, i), tokens=50) for i in range(8)]
    homes = served_by(requests, one_by_one=False)
    ahead = len(SYSTEM) // TOKENS_OF_A_REQUEST
    first = homes.index(next(home for home in homes if home != homes[0]))
    assert first == ahead + 1 or first == ahead, homes
    assert abs(homes.count(homes[0]) - 4) <= 1, homes


def test_where_a_request_would_wait_it_goes_elsewhere():
    long = tuple(range(64 * GRAIN))
    homes = served_by([asked(f"r{i}", (*long, i), tokens=50) for i in range(12)], one_by_one=False)
    assert homes.count(homes[0]) == 8, homes


def test_prompts_of_many_tenants_are_told_apart():
    prompts = [asked(f"r{i}", (*SYSTEM, 1), tenant=f"t{i}") for i in range(4)]
    prefixes = Prefixes()
    for i, request in enumerate(prompts):
        prefixes.sent(request, f"s{i}")
    assert [prefixes.cached(replace(r, id="x")) for r in prompts] == [{f"s{i}": len(SYSTEM)} for i in range(4)]
