"""Every route × {no key, wrong key, each role}: the application does what docs/access.md says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_keys import key_store, make_key
from fake_admin import FakeAdmin
from fake_engine import FakeEngine
from fake_observer import FakeObserver
from starlette.applications import Starlette
from starlette.routing import Route

from isotherm.cluster.api.access.hashing import new_key, new_key_id
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.settings import AppSettings

PAGE = Path(__file__).parents[4] / "docs" / "access.md"
COLUMNS = ("no key", "wrong key", "use", "observe", "admin")
ROW = re.compile(r"^\| `([A-Z]+) (/[^`]*)` \| (.+) \|$", re.M)
TABLE = {
    (method, path): dict(zip(COLUMNS, cells.split(" | "), strict=True))
    for method, path, cells in ROW.findall(PAGE.read_text(encoding="utf-8"))
}


class Front:
    """A front door with a key for each role."""

    def __init__(self, app: Starlette, keys: dict[str, str | None]) -> None:
        self.app, self.keys = app, keys

    def ask(self, method: str, path: str, who: str, anthropic: bool = False) -> httpx.Response:
        key = self.keys[who]
        name, value = ("x-api-key", key) if anthropic else ("authorization", f"Bearer {key}")
        headers = {} if key is None else {name: str(value)}

        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=("10.0.0.7", 5))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(go())


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    made: dict[str, tuple[str, Any]] = {role: make_key(role, roles=[role]) for role in ("use", "observe", "admin")}
    keys = key_store(folder / "keys.json", [entry for _, entry in made.values()])
    batches = BatchService(Store(folder, 1 << 20, 10_000), BatchLimits(), 100_000)
    tokenizer: Any = None
    settings = AppSettings(keys=keys)
    app = build_app(
        FakeEngine(100), tokenizer, "org/m", (), settings, FakeAdmin(), batches=batches, observer=FakeObserver()
    )
    known: dict[str, str | None] = {role: key for role, (key, _) in made.items()}
    yield Front(app, {"no key": None, "wrong key": new_key(new_key_id()), **known})


def routes(app: Starlette) -> set[tuple[str, str]]:
    assert all(isinstance(route, Route) for route in app.routes)
    return {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }


def test_every_route_has_a_row_and_every_row_a_route(front: Front):
    assert routes(front.app) == TABLE.keys()
    assert all(cell in ("ok", "401", "403") for row in TABLE.values() for cell in row.values())


def filled(path: str) -> str:
    return re.sub(r"{[^}]*}", "org/m" if "model" in path else "x", path)


@pytest.mark.parametrize(("method", "path"), sorted(TABLE))
def test_each_cell(front: Front, method: str, path: str):
    for who, cell in TABLE[method, path].items():
        for anthropic in (False, True):
            answer = front.ask(method, filled(path), who, anthropic)
            refused = str(answer.status_code) if answer.status_code in (401, 403) else "ok"
            assert refused == cell, (who, answer.text)
            if cell == "401":
                assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "path", ["//v1/models", "/v1/models/", "/%61dmin/operations", "/health/../admin/experts", "/health/x", "/nothing"]
)
def test_there_is_no_way_around_by_another_spelling(front: Front, path: str):
    assert front.ask("GET", path, "no key").status_code == 401


def test_methods_that_a_route_does_not_have(front: Front):
    assert [front.ask(method, "/status", "no key").status_code for method in ("HEAD", "OPTIONS", "PUT")] == [401] * 3
    assert front.ask("HEAD", "/status", "observe").status_code == 200
    assert front.ask("PUT", "/status", "observe").status_code == 405
    assert front.ask("DELETE", "/admin/operations", "observe").status_code == 403
    assert front.ask("GET", "/nothing", "use").status_code == 404


def test_readiness_says_no_reason_to_those_who_have_no_key(tmp_path: Path):
    _, entry = make_key("a")
    engine, tokenizer = FakeEngine(10), None
    engine.reason = "attention-3 on 10.0.0.9 is gone"
    store = key_store(tmp_path / "k.json", [entry])
    app = build_app(engine, tokenizer, "m", settings=AppSettings(keys=store))  # type: ignore[arg-type]
    answer = Front(app, {"no key": None}).ask("GET", "/ready", "no key")
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (503, {"status": "not ready"}, "1")
