"""Clients that do not read, or do not send: they count as gone after a while, and what is made for them ends."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest
from fake_engine import http_server
from waiting import until

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.middleware import ServeProxyMiddleware
from isotherm.cluster.api.protocol import FrontDoorProtocol
from isotherm.cluster.api.slow_clients import SlowClientMiddleware

pytestmark = pytest.mark.slow

STREAM = (
    b'{"model": "m", "prompt": "hello", "max_tokens": 500, "stream": true, "n": 16, "ignore_eos": true, "logprobs": 20}'
)


def head(length: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


@pytest.fixture
def served(engine, tokenizer):
    engine.max_model_len = 4096
    with http_server(SlowClientMiddleware(build_app(engine, tokenizer, "m"), seconds=0.3)) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def test_one_that_does_not_read_its_stream_is_given_up(served, engine):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(served)
        client.sendall(head(len(STREAM)) + STREAM)
        until(lambda: engine.open)
        until(lambda: not engine.open)
        assert engine.closed_early, "its choices were not finished"


def test_one_that_reads_slowly_is_not(served, engine):
    """It takes a little at a time, but each time within the limit."""
    body = STREAM.replace(b'"n": 16, ', b"").replace(b"500", b"100")
    with socket.socket() as client:
        client.connect(served)
        client.sendall(head(len(body)) + body)
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += client.recv(16384)
            time.sleep(0.02)
    assert b"data: [DONE]" in got and not engine.closed_early


def test_one_that_does_not_send_its_body_is_given_up(served, engine):
    with socket.socket() as client:
        client.settimeout(10)
        client.connect(served)
        client.sendall(head(1000) + b'{"model"')
        begin = time.monotonic()
        assert not client.recv(100).startswith(b"HTTP/1.1 200"), "the connection ends, or says why"
        assert 0.2 < time.monotonic() - begin < 5 and not engine.seen


ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/files"]


def until_its_end(connection):
    got = b""
    while part := connection.recv(65536):
        got += part
    return got


def answer(got):
    head, _, body = got.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return status, dict(line.decode().lower().split(": ", 1) for line in lines), json.loads(body)


@pytest.fixture(params=["application", "proxy"])
def door(request, engine, tokenizer, tmp_path):
    """The application alone, and as it stands in Serve's proxy."""
    batches = BatchService(Store(tmp_path, 1 << 20, 1000), BatchLimits(), 1000)
    app = SlowClientMiddleware(build_app(engine, tokenizer, "m", batches=batches), seconds=0.3)
    app = ServeProxyMiddleware(app) if request.param == "proxy" else app
    with http_server(app, FrontDoorProtocol) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("named", [b"X-Request-Id: mine.1\r\n", b""])
def test_one_whose_body_stalls_is_told_in_its_routes_form_and_the_connection_ends(door, engine, path, named):
    kind = b"multipart/form-data; boundary=b" if path == "/v1/files" else b"application/json"
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx' if path == "/v1/files" else b"{"
    with socket.create_connection(door, timeout=10) as client:
        client.sendall(
            b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: %s\r\n%sContent-Length: 500\r\n\r\n%s"
            % (path.encode(), kind, named, form)
        )
        status, headers, said = answer(until_its_end(client))
    assert status.startswith(b"HTTP/1.1 408 ") and headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == "mine.1" if named else len(headers["x-request-id"]) == 32
    if path == "/v1/messages":
        assert said["type"] == "error" and said["error"]["type"] == "timeout_error"
        assert headers["request-id"] == headers["x-request-id"]
    else:
        assert said["error"]["type"] == "timeout_error" and said["error"]["code"] == "body_timeout"
        assert said["error"].keys() == {"message", "type", "param", "code"}
    assert "0.3 s" in said["error"]["message"] and not engine.seen


def test_one_that_went_away_in_its_body_is_told_nothing(caplog):
    """Neither waits anybody for it: the application learns it at once."""
    incoming = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    seen, sent = [], []

    async def receive():
        return incoming.pop(0)

    async def app(scope, receive, send):
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def send(message):
        sent.append(message)

    begin = time.monotonic()
    through(app, receive, send, seconds=5)
    assert seen == ["http.request", "http.disconnect"] and not sent and not caplog.records
    assert time.monotonic() - begin < 2


def test_one_whose_answer_has_begun_is_not_answered_again():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"

    async def receive():
        await asyncio.Event().wait()

    sent = []

    async def send(message):
        sent.append(message)

    through(app, receive, send)
    assert [message["status"] for message in sent] == [200]


def test_one_that_does_not_take_the_refusal_either_keeps_nobody_waiting():
    """What an earlier request of its connection got may still fill the buffer."""
    told = []

    async def app(scope, receive, send):
        told.append(await receive())

    async def never(message=None):
        await asyncio.Event().wait()

    through(app, never, never)
    assert told == [{"type": "http.disconnect"}]


def test_those_in_time_get_every_message_and_a_disconnect_that_comes():
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"a" and (await receive())["body"] == b"b"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": (await receive())["type"].encode()})

    async def go():
        incoming = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": b"a", "more_body": True})
        incoming.put_nowait({"type": "http.request", "body": b"b"})
        asyncio.get_running_loop().call_later(0.2, incoming.put_nowait, {"type": "http.disconnect"})
        sent = []

        async def send(message):
            sent.append(message)

        await SlowClientMiddleware(app, 0.05)({"type": "http", "path": "/"}, incoming.get, send)
        return sent

    assert asyncio.run(go())[1]["body"] == b"http.disconnect", "waiting for it is no stall"


def test_a_request_that_is_cancelled_meanwhile_is_cancelled():
    async def go():
        async def send(message):
            await asyncio.Event().wait()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        task = asyncio.ensure_future(SlowClientMiddleware(app, 30)({"type": "http", "path": "/"}, None, send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())


def through(app, receive=None, send=None, seconds=0.2):
    """An application behind the middleware, run to its end → how many tasks and timers that took besides."""
    made = {"tasks": 0, "timers": 0}

    async def go():
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counted(*args, **options):
            made["timers"] += 1
            return call_at(*args, **options)

        def task(loop, work, **options):
            made["tasks"] += 1
            return asyncio.Task(work, loop=loop, **options)

        loop.call_at = counted
        loop.set_task_factory(task)
        await SlowClientMiddleware(app, seconds)({"type": "http", "path": "/", "headers": []}, receive, send)
        return dict(made)  # before the loop's own end, which has tasks too

    return asyncio.run(go())


async def taken(message):
    """A client in time."""


def test_messages_in_time_cost_no_timer_and_no_task_each():
    incoming = [{"type": "http.request", "body": b"", "more_body": i < 9} for i in range(10)]
    seen = []

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def app(scope, receive, send):
        seen.extend([(await receive())["type"] for _ in range(11)])
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"", "more_body": True})

    assert through(app, receive, taken, seconds=30) == {"tasks": 0, "timers": 1}
    assert seen == ["http.request"] * 10 + ["http.disconnect"]


def test_a_stall_is_counted_from_when_sending_began_not_from_the_first_message():
    """The timer of the first message goes off in the middle of another one, which then has its whole time."""
    moments = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.15)
        moments.append(time.monotonic())
        await send({"type": "http.response.body", "body": b""})
        moments.append(time.monotonic())
        await send({"type": "http.response.body", "body": b"not sent"})

    sent = []

    async def send(message):
        sent.append(message)
        if len(sent) > 1:
            await asyncio.Event().wait()

    through(app, None, send)
    assert 0.19 < moments[1] - moments[0] < 2 and len(sent) == 2


def test_whoever_waits_for_the_client_learns_that_it_counts_as_gone():
    """Both that wait for it to take something, and the one that waits for its going away."""

    async def app(scope, receive, send):
        await receive()
        waiting = [asyncio.ensure_future(send({"type": "http.response.body", "body": b""})) for _ in range(2)]
        told = await asyncio.wait_for(receive(), 5)
        assert told == {"type": "http.disconnect"} == await receive()
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert not any(task.cancelled() for task in waiting)

    incoming = [{"type": "http.request", "body": b""}]

    async def receive():
        return incoming.pop() if incoming else await asyncio.Event().wait()

    async def send(message):
        await asyncio.Event().wait()

    through(app, receive, send)


def test_one_that_pauses_for_long_between_messages_is_none_that_stalls():
    async def app(scope, receive, send):
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            await asyncio.sleep(0.12)

    sent = []

    async def send(message):
        sent.append(message)

    assert through(app, None, send, seconds=0.05)["timers"] <= 3 + 3  # those of asyncio.sleep among them
    assert len(sent) == 3


def test_a_path_makes_no_line_in_the_log(caplog):
    """Serve's proxy reads the body of whatever is asked for."""

    async def app(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/\nforged", "headers": []}
    asyncio.run(SlowClientMiddleware(app, seconds=0.05)(scope, receive, send))
    (record,) = caplog.records
    assert r"'/\nforged'" in record.getMessage() and "\n" not in record.getMessage()
