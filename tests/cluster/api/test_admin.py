"""The operator's routes over a cluster that only remembers what it was asked."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fake_admin import FakeAdmin
from fake_engine import FakeEngine
from starlette.applications import Starlette

from isotherm.cluster.api.admin import MAX_BODY, admin_routes
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.operations import OperationError, PlacementChangeError


@pytest.fixture
def admin():
    return FakeAdmin()


@pytest.fixture
def call(admin):
    app = build_app(FakeEngine(100), None, "m", admin=admin)  # type: ignore[arg-type]

    def go(method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(ask())

    return go


def test_what_is_shown(call):
    assert call("GET", "/admin/operations").json() == {"operations": [{"id": "op-1"}]}
    assert call("GET", "/admin/operations/op-1").json() == {"id": "op-1"}
    assert call("GET", "/admin/experts").json() == {"heat": {"expert-0": 1.0}}
    assert call("GET", "/admin/autoscaler").json() == {"mode": "on", "decisions": []}


def test_an_operation_is_taken(call):
    answer = call("POST", "/admin/operations", json={"expert_groups": 2})
    assert answer.status_code == 202 and answer.json() == {
        "id": "op-1",
        "phase": "planned",
        "target": {"expert_groups": 2},
    }


@pytest.mark.parametrize("path", ["/admin/operations", "/admin/autoscaler"])
@pytest.mark.parametrize("body", [None, {"expert_groups": 1, "mode": "off"}])
def test_head_is_get_without_a_body_whatever_it_is_sent(call, admin, path, body, monkeypatch):
    """A key that may only observe may send it: it took what POST takes."""

    async def changed(body: Any) -> Any:
        raise AssertionError(f"{path} changed something")

    monkeypatch.setattr(admin, "operate", changed)
    monkeypatch.setattr(admin, "set_autoscaler", changed)
    answer = call("HEAD", path, json=body)
    assert answer.status_code == 200 and answer.content == b""


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (OperationError("no", "expert_groups"), 400, "expert_groups"),
        (OperationError("another runs", conflict=True), 409, None),
        (PlacementChangeError("no such expert"), 400, "copies"),
        (ReplyError("no", status=418), 418, None),
    ],
)
def test_errors_name_the_field(call, admin, error, status, param):
    admin.fails = error
    answer = call("POST", "/admin/operations", json={})
    assert answer.status_code == status and answer.json()["error"]["param"] == param


def test_a_body_that_is_none_is_refused(call):
    assert call("POST", "/admin/operations", content=b"{").status_code == 400
    assert call("POST", "/admin/operations", content=b" " * (MAX_BODY + 1)).status_code == 413
    assert call("GET", "/admin/operations/none").status_code == 404


def test_without_a_cluster_there_are_no_such_routes():
    paths = {route.path for route in admin_routes(FakeAdmin())}
    app = build_app(FakeEngine(100), None, "m")  # type: ignore[arg-type]
    assert isinstance(app, Starlette) and not paths & {getattr(route, "path", "") for route in app.routes}


def test_a_controller_that_is_away_is_a_503_to_come_back_for(call, admin):
    admin.fails = WorkerGoneError("the controller cannot be reached: it is being restarted")
    answer = call("POST", "/admin/operations", json={"expert_groups": 2})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert "being restarted" in answer.json()["error"]["message"]
