"""/health and /ready as the proxy answers them: what is known by events, and the middleware over a replica that can be
slow, gone or not ready."""

from __future__ import annotations

import asyncio
import json

import pytest

from isotherm.cluster import http_health
from isotherm.cluster.http_health import ALIVE_SECONDS, READY_SECONDS, Answer, HealthMiddleware, SignsOfLife


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


def test_a_good_answer_holds_as_long_as_replicas_are_heard():
    clock = Clock()
    signs = SignsOfLife(clock)
    for path in ("/health", "/ready"):
        signs.answered(path, answer(200, clock.now))
    for _ in range(int(READY_SECONDS) + 2):
        clock.now += 1
        signs.heard()
        assert signs.known("/health") is not None
    assert signs.known("/ready") is None, "too old, whatever else was heard"
    clock.now += ALIVE_SECONDS + 0.1
    assert signs.known("/health") is None


def test_a_replica_that_stops_is_not_ready_for_long():
    clock = Clock()
    signs = SignsOfLife(clock)
    signs.answered("/ready", answer(200, clock.now))
    clock.now += ALIVE_SECONDS + 0.1
    assert signs.known("/ready") is None


def test_a_bad_answer_is_never_told_again():
    clock = Clock()
    signs = SignsOfLife(clock)
    signs.answered("/ready", answer(200, clock.now))
    signs.answered("/ready", answer(503, clock.now))
    signs.heard()
    assert signs.known("/ready") is None


class Replica:
    """Behind the middleware. `delay`: seconds that it takes; `status` of its answers; `asked`: how often."""

    def __init__(self):
        self.delay, self.status, self.asked, self.fails = 0.0, 200, 0, False

    async def __call__(self, scope, receive, send):
        if scope["path"] in http_health.PATHS:
            self.asked += 1
            assert (await receive())["type"] == "http.request"
        await asyncio.sleep(self.delay)
        if self.fails:
            raise RuntimeError("no")
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-from", b"replica")]})
        await send({"type": "http.response.body", "body": b'{"status":', "more_body": True})
        await send({"type": "http.response.body", "body": b'"ok"}'})


@pytest.fixture
def times(monkeypatch):
    monkeypatch.setattr(http_health, "QUICK_SECONDS", 0.05)
    monkeypatch.setattr(http_health, "ASK_SECONDS", 0.3)
    monkeypatch.setattr(http_health, "ALIVE_SECONDS", 0.4)


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


def test_neither_waits_behind_work(times):
    """The replica is slow, but its streams go on."""

    async def go():
        replica = Replica()
        door = HealthMiddleware(replica)
        assert [(await get(door, path))[0] for path in http_health.PATHS] == [200, 200]
        replica.delay = 0.25
        streams = [asyncio.ensure_future(get(door, "/v1/completions")) for _ in range(3)]
        await asyncio.sleep(0.3)
        health, ready = await get(door), await get(door, "/ready")
        assert health[:2] == ready[:2] == (200, b'{"status":"ok"}')
        assert health[2] < 0.04 and ready[2] < 0.15
        await asyncio.gather(*streams)

    asyncio.run(go())


@pytest.mark.parametrize("path", http_health.PATHS)
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
