"""Which pages may read answers, and that nobody else's origin ever comes back."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fake_engine import FakeEngine

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings

GOOD, EVIL = "https://app.example", "https://evil.example"


def call(method, path, cors=(GOOD,), **headers):
    app = build_app(FakeEngine(100), None, "m", settings=AppSettings(cors=cors))  # type: ignore[arg-type]

    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(go())


def preflight(origin, cors=(GOOD,), path="/v1/chat/completions"):
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    return call("OPTIONS", path, cors, origin=origin, **wanted)


def allowed(answer):
    return {name for name in answer.headers if name.startswith("access-control-allow")}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/nope", "/v1/completions"])
def test_answers_and_errors_can_be_read_by_the_pages_that_are_named(path):
    answer = call("GET", path, origin=GOOD)
    assert answer.headers["access-control-allow-origin"] == GOOD and "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_fault_of_ours_can_be_read_too(monkeypatch):
    """Starlette's own handler stands outside of what adds the origin: a page saw an error of the network."""

    async def fails(self, request):
        raise ZeroDivisionError

    monkeypatch.setattr("isotherm.cluster.api.about.About.version", fails)
    answer = call("GET", "/version", origin=GOOD)
    assert answer.status_code == 500 and answer.headers["access-control-allow-origin"] == GOOD
    assert answer.headers["x-request-id"] and answer.json()["error"]["code"] == "internal_error"


def test_preflight():
    answer = preflight(GOOD)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == GOOD
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    assert "POST" in answer.headers["access-control-allow-methods"] and int(answer.headers["access-control-max-age"])
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("origin", [EVIL, "null", GOOD + ".evil.example", "http://app.example", GOOD + ":444", "*"])
def test_nobody_else_is_let_in(origin):
    assert "access-control-allow-origin" not in preflight(origin).headers
    assert allowed(call("GET", "/v1/models", origin=origin)) == set()


def test_everybody_is_said_as_such():
    for answer in (call("GET", "/v1/models", ("*",), origin=EVIL, cookie="a=b"), preflight(EVIL, ("*",))):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_without_origins_there_is_nothing_of_it():
    assert allowed(call("GET", "/v1/models", (), origin=GOOD)) == set()
    assert preflight(GOOD, ()).status_code == 204 and allowed(preflight(GOOD, ())) == set()


def test_pages_do_not_get_the_operators_routes_of_this_machine():
    assert call("GET", "/status", origin=GOOD).status_code == 403
