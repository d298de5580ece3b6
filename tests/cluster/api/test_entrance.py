"""The front door's places, by requests and by tokens, through the application."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from isotherm.cluster.api import behalf
from isotherm.cluster.api.access.caller import Caller
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.entrance import Entrance
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.gate import Told
from isotherm.cluster.engine.places import Band, Claim
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams

BODY = {"model": "m", "prompt": "hello", "max_tokens": 4}


def together(app, *asked):
    """The statuses of requests that are made at once, each (body, headers)."""

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            posts = (client.post("/v1/completions", json={**BODY, **body}, headers=headers) for body, headers in asked)
            return await asyncio.gather(*posts)

    return asyncio.run(go())


@pytest.fixture
def app(engine, tokenizer):
    engine.delay_s = 0.05
    return build_app(engine, tokenizer, "m")


@pytest.fixture
def keys(monkeypatch):
    """Callers by a header."""
    known = {"a": Caller("a"), "b": Caller("b"), "bulk": Caller("bulk", priority=10)}
    monkeypatch.setattr(behalf, "caller_of", lambda request: known[request.headers["x-test-key"]])


def test_requests_come_in_while_what_is_open_leaves_room_for_a_token(app, engine):
    engine.tokens, engine.per_delta = 600, 50
    answers = together(app, *[({"prompt": [5] * 240, "max_tokens": 100}, {})] * 4)
    assert Counter(answer.status_code for answer in answers) == {200: 2, 429: 2}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "have 680 tokens, and 600 fit" in refused.json()["error"]["message"]
    # Outputs had 100 of the 100 that they might: nothing changes. All places are free again.
    assert together(app, ({"prompt": [5] * 240, "max_tokens": 100}, {}))[0].status_code == 200


def test_what_outputs_have_had_counts_more_than_what_they_may_have(engine):
    entrance = Entrance(engine)
    for _ in range(100):
        entrance.lengths.ended(10)
    engine.tokens = 1000
    visits = []
    with pytest.raises(ReplyError) as refused:
        while True:
            visits.append(entrance.enter(Claim()))
            visits[-1].settle([GenerationRequest("r", tuple(range(80)), SamplingParams(4000))])
    assert len(visits) == 10 and refused.value.status == 429
    for visit in visits:
        visit.leave()
        visit.leave()
    assert entrance.admission.open == 0
    entrance.enter(Claim())


def test_a_family_has_one_prompt(engine):
    entrance, engine.tokens = Entrance(engine), 150
    for _ in range(2):
        family = [GenerationRequest(f"r{i}", tuple(range(80)), SamplingParams(5), family="f") for i in range(4)]
        visit = entrance.enter(Claim())
        visit.settle(family)
    with pytest.raises(ReplyError, match="have 200 tokens, and 150 fit"):
        entrance.enter(Claim())


def test_a_body_that_says_that_it_is_background_work_leaves_its_place_to_others(app, engine):
    engine.places = 2

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            rows = [asyncio.ensure_future(client.post("/v1/completions", json={**BODY, "priority": 100}))
                    for _ in range(2)]  # fmt: skip
            while len(engine.open) < 2:
                await asyncio.sleep(0.005)
            more = [client.post("/v1/completions", json=BODY) for _ in range(3)]
            return await asyncio.gather(*rows, *more)

    assert [answer.status_code for answer in asyncio.run(go())] == [200, 200, 200, 200, 429]


def test_a_key_that_floods_leaves_places_to_others(app, engine, keys):
    engine.places = 16
    flood = [({}, {"x-test-key": "a"})] * 30
    answers = together(app, *flood, *[({}, {"x-test-key": "b"})] * 2)
    had = Counter((answer.request.headers["x-test-key"], answer.status_code) for answer in answers)
    assert had == {("a", 200): 14, ("a", 429): 16, ("b", 200): 2}
    told = {answer.headers.get("x-isotherm-capacity") for answer in answers if answer.status_code == 200}
    assert told == {Told(16, Band.NORMAL, Band.NORMAL, 1.0, True).as_text()}
    bulk = Told(16, Band.BACKGROUND, Band.BACKGROUND, 1.0, True).as_text()
    assert together(app, ({}, {"x-test-key": "bulk"}))[0].headers["x-isotherm-capacity"] == bulk
