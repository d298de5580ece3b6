"""/health and /ready as the proxy answers them: what is known by events, and the middleware over a replica that can be
slow, gone or not ready."""

from __future__ import annotations

import asyncio
import json

import pytest

from isotherm.cluster.api import health as http_health
from isotherm.cluster.api.health import ALIVE_SECONDS, ONWARD_SECONDS, Answer, HealthMiddleware, SignsOfLife
from isotherm.cluster.api.onward import KEY


def answer(status, at=0.0):
    return Answer({"type": "http.response.start", "status": status, "headers": []}, b"said", at)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_nothing_is_known_at_first():
    signs = SignsOfLife(Clock())
    assert signs.known("/health") is None and signs.known("/ready") is None
    signs.heard()
    assert signs.known("/health") is None, "alive, but what /health says is not known"


def test_a_good_answer_of_health_holds_as_long_as_replicas_are_heard():
    clock = Clock()
    signs = SignsOfLife(clock)
    signs.answered("/health", answer(200, clock.now))
    for _ in range(20):
        clock.now += 1
        signs.heard()
        assert signs.known("/health") is not None
    clock.now += ALIVE_SECONDS + 0.1
    assert signs.known("/health") is None


def test_an_answer_of_ready_holds_only_while_requests_are_seen_to_get_on():
    clock = Clock()
    signs = SignsOfLife(clock)
    signs.answered("/ready", answer(200, clock.now))
    signs.heard()
    assert signs.known("/ready") is None, "nobody says that requests get on"
    signs.began("a")
    assert signs.known("/ready") is None
    for _ in range(20):
        clock.now += 1
        signs.told("a", 0.2)
        assert signs.known("/ready") is not None
    clock.now += ONWARD_SECONDS - 0.3
    assert signs.known("/ready") is not None
    clock.now += 0.2
    assert signs.known("/ready") is None
    signs.told("a", ONWARD_SECONDS + 0.1)
    assert signs.known("/ready") is None, "it has answered, and says that they do not"
    signs.told("a", 0.0)
    signs.ended("a")
    assert signs.known("/ready") is None, "no reply is under way any more"


def test_every_replica_that_has_replies_under_way_must_say_so():
    clock = Clock()
    signs = SignsOfLife(clock)
    signs.answered("/ready", answer(200, clock.now))
    for replica in "a", "b", "b":
        signs.began(replica)
        signs.told(replica, 0.0)
    assert signs.known("/ready") is not None
    clock.now += 1
    signs.told("a", 0.0)
    assert signs.known("/ready") is None, "b is silent"
    signs.ended("b")
    assert signs.known("/ready") is None
    signs.ended("b")
    assert signs.known("/ready") is not None


def test_a_bad_answer_is_never_told_again():
    clock = Clock()
    signs = SignsOfLife(clock)
    signs.answered("/ready", answer(200, clock.now))
    signs.answered("/ready", answer(503, clock.now))
    signs.heard()
    assert signs.known("/ready") is None


class Replica:
    """Behind the middleware. `delay`: seconds that it takes for an answer, or a piece of a stream; `status` of its
    answers; `asked`: how often; `onward`: what it says of its requests with each piece."""

    def __init__(self):
        self.delay, self.status, self.asked, self.fails, self.onward = 0.0, 200, 0, False, None

    async def __call__(self, scope, receive, send):
        said = {}
        if scope["path"] in http_health.ASK_SECONDS:
            self.asked += 1
            assert (await receive())["type"] == "http.request"
        elif self.onward is not None:
            said = {KEY: ("a", self.onward)}
        await asyncio.sleep(self.delay)
        if self.fails:
            raise RuntimeError("no")
        start = {"type": "http.response.start", "status": self.status, "headers": [(b"x-from", b"replica")]}
        await send(start | said)
        await send({"type": "http.response.body", "body": b'{"status":', "more_body": True} | said)
        if said:
            for _ in range(4):
                await asyncio.sleep(0.1)
                await send({"type": "http.response.body", "body": b"", "more_body": True} | said)
        await send({"type": "http.response.body", "body": b'"ok"}'})


@pytest.fixture
def times(monkeypatch):
    monkeypatch.setattr(http_health, "QUICK_SECONDS", {"/health": 0.05, "/ready": 0.05})
    monkeypatch.setattr(http_health, "ASK_SECONDS", {"/health": 0.3, "/ready": 0.3})
    monkeypatch.setattr(http_health, "ALIVE_SECONDS", 0.4)
    monkeypatch.setattr(http_health, "ONWARD_SECONDS", 0.2)
    monkeypatch.setattr(http_health, "LOOK", 0.01)


async def get(door, path="/health", method="GET"):
    """Status, body and the seconds that it took."""
    sent, begin = [], asyncio.get_running_loop().time()

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    await door({"type": "http", "path": path, "method": method, "headers": []}, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), asyncio.get_running_loop().time() - begin


def test_a_replica_is_asked_and_its_answer_told(times):
    async def go():
        replica = Replica()
        door = HealthMiddleware(replica)
        assert (await get(door))[:2] == (200, b'{"status":"ok"}')
        assert (await get(door, method="HEAD"))[:2] == (200, b"")
        replica.status = 503
        assert (await get(door, "/ready"))[:2] == (503, b'{"status":"ok"}')
        replica.status = 200
        assert (await get(door, "/ready"))[0] == 200

    asyncio.run(go())


@pytest.mark.parametrize("onward, ready", [(0.05, 200), (5.0, 503), (None, 503)])
def test_neither_waits_behind_work(times, onward, ready):
    """The replica is slow to answer, but its streams go on; whether their tokens do it says itself."""

    async def go():
        replica = Replica()
        door = HealthMiddleware(replica)
        assert [(await get(door, path))[0] for path in http_health.ASK_SECONDS] == [200, 200]
        replica.onward = onward
        streams = [asyncio.ensure_future(get(door, "/v1/completions")) for _ in range(3)]
        await asyncio.sleep(0.05)
        replica.delay = 2.0
        health, said = await get(door), await get(door, "/ready")
        assert health[:2] == (200, b'{"status":"ok"}') and health[2] < 0.04
        assert said[0] == ready and said[2] < (0.15 if ready == 200 else 0.4)
        assert {status for status, _, _ in await asyncio.gather(*streams)} == {200}
        await door._background.close()

    asyncio.run(go())


def test_another_question_for_ready_is_asked_where_the_first_has_no_answer(times):
    """The replica that has it may stand still, and another answer."""

    async def go():
        replica = Replica()
        door = HealthMiddleware(replica)
        replica.delay = 60
        assert (await get(door, "/ready"))[0] == 503
        replica.delay = 0.0
        await asyncio.sleep(0.05)
        assert (await get(door, "/ready"))[0] == 200 and replica.asked == 2

    asyncio.run(go())


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_replicas_that_do_not_answer_are_a_503(times, path):
    async def go():
        replica = Replica()
        door = HealthMiddleware(replica)
        replica.delay = 60
        asked = await asyncio.gather(*(get(door, path) for _ in range(5)))
        assert [one[0] for one in asked] == [503] * 5 and all(0.2 < one[2] < 1 for one in asked)
        assert json.loads(asked[0][1])["reason"].startswith("no ingress replica has answered")
        assert replica.asked == 1, "one question for all"
        await door._background.close()
        replica.delay, replica.fails = 0.0, True
        assert (await get(door, path))[0] == 503, "Serve's own failure is no answer"
        replica.fails = False
        assert (await get(door, path))[0] == 200

    asyncio.run(go())


def test_refusals_are_no_sign_of_life(times):
    async def go():
        replica = Replica()
        door = HealthMiddleware(replica)
        assert (await get(door))[0] == 200
        await asyncio.sleep(0.45)
        replica.status = 503
        await get(door, "/v1/completions")
        assert (await get(door))[0] == 503

    asyncio.run(go())
