"""Who may use the operator's routes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fake_admin import FakeAdmin
from fake_engine import FakeEngine
from fake_observer import FakeObserver

from isotherm.cluster.api.access.reach import Access, why_not_local
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings

GUARDED = [
    "/admin/operations",
    "/admin/experts",
    "/admin/autoscaler",
    "/admin/operations/op-1",
    "//admin/experts/",
    "/status",
    "/metrics",
]
FREE = ["/health", "/ready", "/version", "/v1/models"]


def get(path, peer="127.0.0.1", access=None, **headers):
    settings = AppSettings() if access is None else AppSettings(access=access)
    tokenizer: Any = None
    app = build_app(FakeEngine(100), tokenizer, "m", (), settings, FakeAdmin(), observer=FakeObserver())

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app, client=(peer, 5)), base_url="http://127.0.0.1:8000"
        ) as client:
            return await client.get(
                "http://127.0.0.1:8000" + path,
                headers={name.replace("_", "-"): value for name, value in headers.items()},
            )

    return asyncio.run(ask())


@pytest.mark.parametrize("peer", ["10.0.0.7", "192.168.1.2", "2001:db8::1", "::ffff:10.0.0.7", "testclient", ""])
def test_operators_routes_answer_this_machine_only(peer):
    for path in GUARDED:
        answer = get(path, peer)
        field = "http.metrics" if path == "/metrics" else "http.admin"
        assert (
            answer.status_code == 403 and answer.json()["error"]["param"] == field and f"{field}: open" in answer.text
        )
        assert answer.headers["x-request-id"]
    assert [get(path, peer).status_code for path in FREE] == [200] * len(FREE)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_answered(peer):
    assert [get(path, peer).status_code for path in GUARDED + FREE] == [200] * len(GUARDED + FREE)


def test_the_manifest_opens_them_one_by_one():
    assert get("/metrics", "10.0.0.7", Access(metrics="open")).status_code == 200
    assert get("/admin/experts", "10.0.0.7", Access(metrics="open")).status_code == 403
    assert get("/status", "10.0.0.7", Access(admin="open")).status_code == 200
    assert get("/metrics", "10.0.0.7", Access(admin="open")).status_code == 403


def test_headers_let_nobody_in():
    assert (
        get(
            "/admin/experts", "10.0.0.7", x_forwarded_for="127.0.0.1", x_real_ip="127.0.0.1", forwarded="for=127.0.0.1"
        ).status_code
        == 403
    )


def test_a_proxy_of_this_machine_speaks_for_others():
    for name in ("x_forwarded_for", "x_real_ip", "forwarded"):
        answer = get("/status", **{name: "10.0.0.7"})
        assert answer.status_code == 403 and "through a proxy" in answer.text


def test_a_page_whose_name_was_bound_to_this_machine_reads_nothing():
    """A browser takes it for a page of the server, and says so."""
    for path in GUARDED:
        answer = get(path, host="evil.example:8000")
        assert answer.status_code == 403 and "'evil.example:8000'" in answer.text
    assert get("/admin/experts", host="localhost:8000").status_code == 200
    assert get("/admin/experts", access=Access(admin="open"), host="any.name").status_code == 200


@pytest.mark.parametrize(
    ("headers", "ok"),
    [
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, True),
        ({"host": "localhost:8000", "sec-fetch-site": "none"}, True),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, True),
        ({"host": "LOCALHOST"}, True),
        ({"host": "localhost.:8000"}, True),
        ({"host": "isotherm.localhost:8000"}, True),
        ({"host": "0.0.0.0:8000"}, True),
        ({"host": "[::1]"}, True),
        ({"host": "127.0.0.1"}, True),
        ({"host": ""}, True),
        ({}, True),  # none of a browser's
        ({"host": "rebound.example:8000"}, False),  # a GET to its own site brings no Origin, nor says from where it is
        ({"host": "localhost.rebound.example"}, False),
        ({"host": "10.0.0.7:8000"}, False),
        ({"host": "[::1"}, False),
        ({"host": "", "origin": "http://rebound.example"}, False),
        ({"host": "127.0.0.1:8000", "origin": "http://evil.example"}, False),
        ({"host": "127.0.0.1:8000", "origin": "null"}, False),
        ({"host": "127.0.0.1:8000", "sec-fetch-site": "cross-site"}, False),
        (
            {"host": "rebound.example:8000", "origin": "http://rebound.example:8000", "sec-fetch-site": "same-origin"},
            False,
        ),
        ({"host": "rebound.example:8000", "sec-fetch-site": "same-origin"}, False),
    ],
)
def test_pages_of_other_sites_are_refused(headers, ok):
    assert (why_not_local("127.0.0.1", headers) is None) is ok
