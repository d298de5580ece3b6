"""Which requests there are, and where their time went: the book by itself, and as the front door keeps it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace

import httpx
import pytest
from fake_engine import FakeEngine
from fake_observer import FakeObserver
from starlette.requests import Request

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.in_process import ask
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.request_book import REMEMBERED, RequestBook, RequestRecord
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.messages.requests import Delta

CHAT = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "a secret"}]}
PATH = "/v1/chat/completions"


@pytest.fixture
def ended() -> list[RequestRecord]:
    return []


@pytest.fixture
def app(engine, tokenizer, ended):
    return build_app(
        engine, tokenizer, "m", settings=AppSettings(first_event_s=0.01), observer=FakeObserver([ended.append])
    )


def asked(app, path=PATH, **fields) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(path, json=CHAT | fields, headers={"x-request-id": "mine"})

    return asyncio.run(go())


def requests(app) -> dict:
    async def go() -> dict:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get("/admin/requests")).json()

    return asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_went_well(app, ended, stream):
    reply = asked(app, stream=stream, n=2)
    (record,) = ended
    assert reply.status_code == 200 and record.status == 200 and record.error == ""
    assert (record.id, record.route, record.model, record.key) == ("mine", PATH, "m", "")
    assert (record.stream, record.choices, record.output_tokens, record.state) == (stream, 2, 8, "ended")
    assert record.finish_reasons == ("length", "length") and record.cached_tokens == record.prompt_tokens // 2 > 0
    assert record.reply.startswith("chatcmpl-") and record.reply in reply.text
    parts = record.prepare + record.queue + record.prefill + record.decode
    assert record.first_token is not None and record.seconds == pytest.approx(parts)


def test_what_was_said_is_nowhere(app):
    asked(app)
    text = json.dumps(requests(app))
    assert "mine" in text and "secret" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_and_failures_have_the_code_that_the_client_was_told(app, engine, ended, stream):
    asked(app, max_tokens=-1)
    engine.places = 0
    asked(app, stream=stream)
    engine.places = 100
    engine.unavailable = "no shard"
    asked(app, stream=stream)
    engine.unavailable = ""
    engine.fail_after = 0
    asked(app, stream=stream)
    assert [(r.status, r.error) for r in ended] == [
        (400, "invalid_request_error"), (429, "overloaded"), (503, "unavailable"), (500, "generation_failed"),
    ]  # fmt: skip
    assert all(r.first_token is None and r.state == "ended" and r.decode == 0 for r in ended[:3])
    assert ended[0].prepare == ended[0].seconds > 0 and ended[2].queue > 0


def test_a_batchs_row_that_finds_no_room_is_no_refused_request(app, engine, ended):
    """It waits, for hours maybe: its tries would push real requests out of the book, and raise IsothermOverloaded."""

    def row():
        return asyncio.run(ask(app, 1000, "", PATH, CHAT)).status

    engine.places = 0
    assert [row() for _ in range(3)] == [429] * 3
    engine.places, engine.unavailable = 100, "no shard"
    assert row() == 503
    assert ended == requests(app)["recent"] == []
    engine.unavailable, engine.fail_after = "", 0
    assert row() == 500, "that one is told"
    engine.fail_after = None
    assert row() == 200 and [record.status for record in ended] == [500, 200]


def test_a_row_that_its_keys_limits_refuse_is_none_either(ended):
    book = RequestBook([ended.append])
    error = ReplyError("later", status=429, code="rate_limit_exceeded")
    scope = {"type": "http", "path": PATH, "app": SimpleNamespace(routes=[])}
    book.refuse(Request({**scope, "state": {"priority": 1000}}), error)
    assert ended == [] and book.open_count == 0
    book.refuse(Request(scope), error)
    assert [record.error for record in ended] == ["rate_limit_exceeded"]


def test_a_stream_that_breaks_off_has_its_error_and_status_200(app, engine, ended):
    engine.fail_after, engine.delay_s = 2, 0.02
    assert asked(app, stream=True).status_code == 200
    assert (ended[0].status, ended[0].error, ended[0].output_tokens) == (200, "generation_failed", 2)


class Held(FakeEngine):
    """Gives one token, and waits then."""

    async def generate(self, request):
        yield Delta(request.id, 0, (5,), queued_seconds=0.0)
        await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
def test_open_requests_and_those_whose_client_goes(tokenizer, ended, stream):
    engine = Held(tokenizer.vocab_size)
    observer = FakeObserver([ended.append])
    book = observer.book
    app = build_app(engine, tokenizer, "m", settings=AppSettings(first_event_s=0.01), observer=observer)

    async def go() -> RequestRecord:
        gone = asyncio.Event()
        body = json.dumps(CHAT | {"stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"",
                 "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
                 "server": ("test", 80), "client": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip
        task = asyncio.ensure_future(app(scope, receive, send))
        while not (running := book.running()) or running[0].state != "generating":
            await asyncio.sleep(0.01)
        gone.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(task, 5)
        return running[0]

    running = asyncio.run(go())
    assert running.is_open and running.status == 0 and running.output_tokens == 1
    assert [(r.status, r.error, r.output_tokens) for r in ended] == [(499, "client_closed", 1)]
    assert book.running() == [] and book.recent() == ended


def test_the_book_is_bounded_and_the_newest_come_first(app, ended):
    book = RequestBook()
    for i in range(REMEMBERED + 5):
        with book.open(Request({"type": "http", "path": PATH, "state": {"request_id": str(i)}})):
            assert [r.id for r in book.running()] == [str(i)]
    recent = book.recent()
    assert len(recent) == REMEMBERED and recent[0].id == str(REMEMBERED + 4) and book.running() == []


def test_a_sink_that_fails_stops_nothing(app, ended):
    def fails(record: RequestRecord) -> None:
        raise OSError("full")

    book = RequestBook([fails])
    book.tell(ended.append)

    with book.open(Request({"type": "http", "path": PATH})):
        pass
    assert len(ended) == 1
