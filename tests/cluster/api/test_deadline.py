"""Requests whose time is over: while they wait, while they stream, while their body is read."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from starlette.datastructures import Headers
from virtual_time import run_in_virtual_time

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.in_process import ask
from isotherm.cluster.api.deadline import Deadline, time_limit
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.settings import AppSettings

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50},
}
paths = pytest.mark.parametrize("path", sorted(BODIES))


def post(app, path, headers=None, content=None, **fields):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            given = {"content": content} if content else {"json": {"model": "m", **BODIES[path], **fields}}
            answer = await client.post(path, headers=headers, **given)
            assert asyncio.get_running_loop().time() < 5
            return answer

    return run_in_virtual_time(go())


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch):
    """What is done in threads takes no virtual time: it is done at once, where it is asked for."""

    async def at_once(call, *arguments):
        return call(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


@pytest.fixture
def app(engine, tokenizer):
    engine.delay_s = 30.0
    return build_app(engine, tokenizer, "m", settings=AppSettings(first_event_s=0.01))


@paths
@pytest.mark.parametrize("how", ["field", "header"])
def test_one_that_waits_ends_with_an_error_by_name(app, engine, path, how):
    asked = {"timeout": 0.05} if how == "field" else {"headers": {"x-request-timeout": "0.05"}}
    answer = post(app, path, **asked)
    assert answer.status_code == 408 and answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert "the request's time of 0.05 s is over; it was waiting for its first token" in error["message"]
    assert error["type"] == "timeout_error" and error.get("code", "deadline_exceeded") == "deadline_exceeded"
    assert not engine.open and engine.closed_early == 1, "its place and its blocks are free"


@paths
def test_one_that_streams_ends_with_an_error_event(app, engine, path):
    engine.delay_s = 0.02
    answer = post(app, path, stream=True, timeout=0.2)
    assert answer.status_code == 200
    *_, last = (line for line in answer.text.splitlines() if line.startswith("data: "))
    said = json.dumps(json.loads(last.removeprefix("data: ")))
    assert "time of 0.2 s is over; it had" in said
    assert "timeout_error" in said or path == "/v1/responses", "whose errors have no such word"
    assert not engine.open and engine.closed_early == 1


def test_one_that_is_done_in_time_knows_nothing_of_it(app, engine):
    engine.delay_s = 0.0
    answer = post(app, "/v1/completions", timeout=30, max_tokens=3)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


def test_every_choice_ends(app, engine):
    engine.delay_s = 0.02
    answer = post(app, "/v1/completions", timeout=0.2, n=4, max_tokens=400)
    assert answer.status_code == 408 and not engine.open and engine.closed_early == 4


@pytest.mark.parametrize(("client", "server", "over"), [(60, 0.05, "0.05"), (0.05, 60, "0.05"), (None, 0.05, "0.05")])
def test_whichever_is_sooner_counts(engine, tokenizer, client, server, over):
    engine.delay_s = 30.0
    app = build_app(engine, tokenizer, "m", settings=AppSettings(request_timeout_s=server))
    fields = {} if client is None else {"timeout": client}
    assert f"time of {over} s" in post(app, "/v1/completions", **fields).json()["error"]["message"]


def test_rows_of_a_batch_have_their_batchs_time(engine, tokenizer):
    engine.delay_s = 0.05
    app = build_app(engine, tokenizer, "m", settings=AppSettings(request_timeout_s=0.1))
    answer = run_in_virtual_time(
        ask(app, 100, "", "/v1/completions", {"model": "m", "prompt": "hello", "max_tokens": 5})
    )
    assert answer.status == 200


@pytest.mark.parametrize("said", ["0", "-1", "soon", "nan", "inf", "1e9", ""])
def test_a_header_that_is_no_time_is_refused_by_name(app, said):
    answer = post(app, "/v1/completions", headers={"x-request-timeout": said})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout")


@pytest.mark.parametrize("said", [0, -1, 86401, "5", True])
def test_a_field_that_is_no_time_is_refused_by_name(app, said):
    answer = post(app, "/v1/completions", timeout=said)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout")


def test_a_body_that_does_not_come_in_time(engine, tokenizer):
    app = build_app(engine, tokenizer, "m", settings=AppSettings(request_timeout_s=0.05))

    async def slowly():
        yield b'{"model": '
        await asyncio.sleep(30)

    answer = post(app, "/v1/completions", content=slowly())
    assert answer.status_code == 408 and "its body was being read" in answer.json()["error"]["message"]


def test_the_sooner_of_two_deadlines():
    assert [Deadline(100.0, a).sooner(b).at for a, b in ((None, None), (5, None), (None, 5), (5, 9), (9, 5))] == [
        None, 105, 105, 105, 105
    ]  # fmt: skip
    assert time_limit(Headers({})) is None and time_limit(Headers({"X-Request-Timeout": "2.5"})) == 2.5
    with pytest.raises(ReplyError, match="at most 86400"):
        time_limit(Headers({"x-request-timeout": "86401"}))
