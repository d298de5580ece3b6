"""The bound in Serve's proxy: learnt from what replicas say, kept without asking them."""

from __future__ import annotations

import asyncio
import json

import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster.api.gate import CAPACITY_HEADER, GateMiddleware, Told
from isotherm.cluster.engine.places import Band


class Replicas:
    """Answer when told to, and tell a capacity."""

    def __init__(self, capacity: int | None = 2):
        self.capacity, self.reached, self.go = capacity, 0, asyncio.Event()
        self.weights: dict[bytes, float] = {}  # of keys; none: the server has no keys
        self.band = Band.NORMAL  # of the request that is answered

    async def __call__(self, scope, receive, send):
        self.reached += 1
        await self.go.wait()
        headers = dict(scope["headers"])
        key = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if self.weights and key not in self.weights:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"who?"})
            return
        said = ""
        if self.capacity is not None:
            weight = self.weights.get(key, 1.0)
            said = Told(self.capacity, self.band, Band.NORMAL, weight, bool(key)).as_text()
        headers = [(CAPACITY_HEADER, said.encode())] if said else []
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"1"), *headers]})
        await send({"type": "http.response.body", "body": b"ok"})


async def ask(gate, method="POST", path="/v1/completions", key=b"", spelling=b"Bearer "):
    """`spelling`: what stands before the key; none: it has a header of its own."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", spelling + key) if spelling else (b"x-api-key", key)] if key else []
    await gate({"type": "http", "method": method, "path": path, "headers": headers}, None, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def play(act, **options):
    async def go():
        replicas = Replicas(**options)
        await asyncio.wait_for(act(replicas, GateMiddleware(replicas)), 20)

    run_in_virtual_time(go())


async def opened(gate, count, **request):
    tasks = [asyncio.ensure_future(ask(gate, **request)) for _ in range(count)]
    await asyncio.sleep(0.01)
    return tasks


@pytest.mark.parametrize("keyed", [False, True])
def test_what_is_told_is_read(keyed: bool):
    told = Told(1 << 40, Band.BACKGROUND, Band.URGENT, 0.25, keyed)
    assert Told.parse(told.as_text()) == told
    before = f"{told.capacity} {told.band:d} {told.next_band:d} {told.weight:g}" + " keyed" * keyed
    assert Told.parse(before) == told, "of a replica of the version before"


def test_any_number_is_let_in_before_a_replica_has_told_its_capacity():
    async def act(replicas, gate):
        tasks = await opened(gate, 9)
        assert replicas.reached == 9
        replicas.go.set()
        assert [(await task)[0] for task in tasks] == [200] * 9

    play(act)


def test_what_is_beyond_the_capacity_is_refused_without_a_replica():
    async def act(replicas, gate):
        replicas.go.set()
        status, headers, _ = await ask(gate)
        assert status == 200 and headers == {b"a": b"1"}, "the header is the proxy's"
        replicas.go.clear()
        tasks = await opened(gate, 2)
        status, headers, body = await ask(gate)
        assert (status, replicas.reached) == (429, 3) and int(headers[b"retry-after"]) >= 1
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert json.loads((await ask(gate, path="/v1/messages"))[2])["error"]["type"] == "rate_limit_error"
        replicas.capacity = 5
        replicas.go.set()
        await asyncio.gather(*tasks)
        replicas.go.clear()
        more = await opened(gate, 5)
        assert replicas.reached == 8
        for task in more:
            task.cancel()
        await asyncio.gather(*more, return_exceptions=True)
        assert len(await opened(gate, 5)) == 5 and replicas.reached == 13, (
            "places of requests that end otherwise are free"
        )

    play(act)


def test_a_place_is_free_when_the_client_has_its_answer():
    """As many clients as there are places, each of which asks again at once: none is refused."""

    async def act(replicas, gate):
        replicas.go.set()
        assert (await ask(gate))[0] == 200
        asked = []

        async def send(message):
            if message["type"] == "http.response.body":
                asked.append((await ask(gate))[0])

        replicas.capacity = 1
        await ask(gate)
        await gate({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, None, send)
        assert asked == [200]

    play(act)


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("GET", "/health"), ("POST", "/admin/operations")])
def test_only_requests_for_the_engine_are_counted(method, path):
    async def act(replicas, gate):
        replicas.go.set()
        await ask(gate)
        replicas.go.clear()
        await opened(gate, 2)
        await opened(gate, 1, method=method, path=path)
        assert replicas.reached == 4

    play(act)


def test_a_storm_of_refusals_is_slowed_down():
    """Clients that come again at once: after a while each refusal takes a second, and costs nothing meanwhile."""

    async def act(replicas, gate):
        replicas.go.set()
        await ask(gate)
        replicas.go.clear()
        await opened(gate, 2)
        loop = asyncio.get_running_loop()
        begin, answered = loop.time(), 0

        async def hammer():
            nonlocal answered
            while loop.time() < begin + 1.5:
                assert (await ask(gate))[0] == 429
                answered += 1

        await asyncio.gather(*(hammer() for _ in range(300)))
        assert answered < 1000

    play(act)


def test_a_single_refusal_comes_at_once():
    async def act(replicas, gate):
        replicas.go.set()
        await ask(gate)
        replicas.go.clear()
        await opened(gate, 2)
        begin = asyncio.get_running_loop().time()
        await ask(gate)
        assert asyncio.get_running_loop().time() - begin < 0.1

    play(act)


def test_a_key_that_floods_leaves_room_for_others():
    async def act(replicas, gate):
        replicas.weights = {b"a": 1.0, b"b": 1.0, b"c": 1.0}
        replicas.go.set()
        for key in (b"a", b"b"):
            assert (await ask(gate, key=key))[0] == 200
        replicas.go.clear()
        flood = await opened(gate, 20, key=b"a")
        assert replicas.reached == 2 + 14
        assert (await opened(gate, 1, key=b"b")) and replicas.reached == 17
        # Whoever has no answer yet may be anybody.
        await opened(gate, 5, key=b"c")
        assert replicas.reached == 18
        refused, _ = await asyncio.wait(flood, timeout=0.5)
        assert len(refused) == 6 and all(task.result()[0] == 429 for task in refused)

    play(act, capacity=16)


def test_one_key_in_many_spellings_is_one_key():
    async def act(replicas, gate):
        replicas.weights = {b"a": 1.0, b"b": 1.0}
        replicas.go.set()
        assert (await ask(gate, key=b"a"))[0] == (await ask(gate, key=b"b"))[0] == 200
        replicas.go.clear()
        for spelling in (b"Bearer ", b"bearer ", b"BEARER  ", b""):
            await opened(gate, 5, key=b"a", spelling=spelling)
        assert replicas.reached == 2 + 14
        assert (await opened(gate, 1, key=b"b")) and replicas.reached == 17

    play(act, capacity=16)


def test_keys_that_nobody_knows_cannot_take_the_places_of_others():
    async def act(replicas, gate):
        replicas.weights = {b"a": 1.0}
        replicas.go.set()
        await ask(gate, key=b"a")
        replicas.go.clear()
        for i in range(40):
            await opened(gate, 1, key=b"made up %d" % i)
        assert replicas.reached == 1 + 14
        await opened(gate, 2, key=b"a")
        assert replicas.reached == 17

    play(act, capacity=16)


def test_background_work_gives_its_place_back_when_it_is_known_for_what_it_is():
    async def act(replicas, gate):
        replicas.go.set()
        await ask(gate)
        replicas.band = Band.BACKGROUND
        ended = asyncio.Event()

        async def send(message):
            if message["type"] == "http.response.body":
                await ended.wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        rows = [asyncio.ensure_future(gate(scope, None, send)) for _ in range(2)]
        await asyncio.sleep(0.01)
        replicas.go.clear()
        assert replicas.reached == 3
        await opened(gate, 3)
        assert replicas.reached == 5, "as many of others as if there were no rows"
        ended.set()
        await asyncio.gather(*rows)

    play(act)


def test_a_proxy_remembers_so_many_keys_only(monkeypatch):
    async def act(replicas, gate):
        replicas.weights = {b"%d" % i: 1.0 for i in range(9)}
        replicas.go.set()
        for key in replicas.weights:
            await ask(gate, key=key)
        assert len(gate._known) == 4

    monkeypatch.setattr("isotherm.cluster.api.gate._MOST_KEYS", 4)
    play(act, capacity=16)
