"""GET /admin/events: that it can be taken up again, that it ends when the server does, and that it is bounded."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from api_keys import key_store, make_key
from fake_admin import FakeAdmin
from fake_engine import FakeEngine, http_server

from isotherm.cluster.api import events
from isotherm.cluster.api.access.keys_file import write_keys
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.messages.membership import WorkerGoneError


def app_with(admin: Any, **options: Any) -> Any:
    return build_app(FakeEngine(100), None, "m", admin=admin, **options)  # type: ignore[arg-type]


def parts(lines: Any, count: int) -> list[dict[str, Any]]:
    """The next parts of a stream: their id, event and data."""
    found: list[dict[str, Any]] = [{}]
    for line in lines:
        name, _, value = line.partition(":")
        if not line and found[-1]:
            if len(found) == count:
                return found
            found.append({})
        elif name:
            found[-1][name] = json.loads(value) if name == "data" else value.strip()
    return [part for part in found if part]


def test_all_there_is_then_what_changes_and_taken_up_again():
    admin = FakeAdmin()
    admin.feed.put("worker/a", {"id": "a"})
    with http_server(app_with(admin)) as url:
        with httpx.stream("GET", f"{url}/admin/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.iter_lines()
            (first,) = parts(lines, 1)
            assert first == {
                "id": "epoch:1",
                "event": "snapshot",
                "data": {"set": {"worker/a": {"id": "a"}}, "gone": []},
            }
            admin.feed.put("worker/b", {"id": "b"})
            (second,) = parts(lines, 1)
            assert (second["event"], second["data"]["set"]) == ("change", {"worker/b": {"id": "b"}})
        admin.feed.drop("worker/a")
        with httpx.stream("GET", f"{url}/admin/events", headers={"last-event-id": second["id"]}) as stream:
            (third,) = parts(stream.iter_lines(), 1)
            assert third["event"] == "change" and third["data"] == {"set": {}, "gone": ["worker/a"]}


def test_no_controller_is_a_status_at_first_and_an_event_later():
    admin = FakeAdmin()
    admin.feed.put("a", 1)
    with http_server(app_with(admin)) as url:
        with httpx.stream("GET", f"{url}/admin/events") as stream:
            lines = stream.iter_lines()
            parts(lines, 1)
            admin.fails = WorkerGoneError("the controller is away")
            last = parts(lines, 9)[-1]
            assert last["event"] == "error" and "away" in last["data"]["error"]["message"]
        answer = httpx.get(f"{url}/admin/events")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_it_ends_when_the_server_does():
    ending: list[bool] = []
    admin = FakeAdmin()
    admin.feed.put("a", 1)
    with (
        http_server(app_with(admin, ends=lambda: bool(ending))) as url,
        httpx.stream("GET", f"{url}/admin/events", timeout=20) as stream,
    ):
        lines = stream.iter_lines()
        parts(lines, 1)
        ending.append(True)
        assert parts(lines, 2) == []


@pytest.mark.parametrize("roles", [[], ["use"]])
def test_it_ends_when_its_key_is_revoked_or_may_look_no_more(tmp_path, roles):
    """It went on for ever, and told whoever held the key all that came."""
    (key, entry), (other, second) = make_key("ann", roles=["observe"]), make_key("bob", roles=["observe"])
    keys = key_store(tmp_path / "k.json", [entry, second])
    admin = FakeAdmin()
    admin.feed.put("a", 1)
    with http_server(app_with(admin, settings=AppSettings(keys=keys))) as url:

        def stream(key: str) -> Any:
            return httpx.stream("GET", f"{url}/admin/events", headers={"authorization": f"Bearer {key}"}, timeout=20)

        with stream(key) as revoked, stream(other) as kept:
            lines, on = revoked.iter_lines(), kept.iter_lines()
            parts(lines, 1), parts(on, 1)
            write_keys(tmp_path / "k.json", [second, *(entry.model_copy(update={"roles": [r]}) for r in roles)])
            keys.look()
            admin.feed.put("b", 2)
            assert parts(lines, 1) == []
            assert parts(on, 1)[0]["data"]["set"] == {"b": 2}
        with stream(key) as again:
            assert again.status_code == (403 if roles else 401)


def test_head_has_the_headers_and_an_end():
    with http_server(app_with(FakeAdmin())) as url:
        answer = httpx.head(f"{url}/admin/events", timeout=10)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")


def test_a_server_that_ends_has_no_stream_to_begin():
    with http_server(app_with(FakeAdmin(), ends=lambda: True)) as url:
        answer = httpx.get(f"{url}/admin/events", timeout=20)
    assert answer.status_code == 503 and "about to end" in answer.text


def test_so_many_streams_and_no_more(monkeypatch):
    monkeypatch.setattr(events, "MAX_STREAMS", 1)
    admin = FakeAdmin()
    admin.feed.put("a", 1)
    with http_server(app_with(admin)) as url:
        with httpx.stream("GET", f"{url}/admin/events") as stream:
            lines = stream.iter_lines()  # kept: without it httpx closes the stream
            parts(lines, 1)
            refused = httpx.get(f"{url}/admin/events")
            assert refused.status_code == 429 and "1 event streams are open" in refused.json()["error"]["message"]
        again, deadline = 429, time.monotonic() + 20
        while again == 429 and time.monotonic() < deadline:  # until the server has noticed that the first one left
            with httpx.stream("GET", f"{url}/admin/events") as stream:
                again = stream.status_code
        assert again == 200


@pytest.mark.parametrize(("body", "status"), [({"mode": "advise"}, 200), (b"{", 400)])
def test_the_autoscalers_mode(body, status):
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app_with(FakeAdmin()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post("/admin/autoscaler", content=content)

    answer = asyncio.run(ask())
    assert answer.status_code == status and (status != 200 or answer.json()["mode"] == "advise")
