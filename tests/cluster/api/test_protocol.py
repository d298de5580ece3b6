"""HTTP/1 as Serve's proxy reads it, over real sockets: offers to upgrade, HTTP/1.0, and what is left as it is."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress

import pytest
import uvicorn
from fake_engine import http_server
from uvicorn.server import ServerState

from isotherm.cluster.api.gate import GateMiddleware
from isotherm.cluster.api.health import HealthMiddleware
from isotherm.cluster.api.line.proxy_end import ProxyLineMiddleware
from isotherm.cluster.api.lost_replica import LostReplicaMiddleware
from isotherm.cluster.api.middleware import ServeProxyMiddleware, serve_proxy_middlewares, steers_serve
from isotherm.cluster.api.protocol import MAX_HEAD_BYTES, FrontDoorProtocol, without_upgrade
from isotherm.cluster.api.slow_clients import SlowClientMiddleware
from isotherm.cluster.api.unrouted import UnroutedMiddleware

pytestmark = pytest.mark.slow

# As Java's HttpClient and `curl --http2` send it.
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"


async def echo(scope, receive, send):
    """Says what it got; at /stream in two parts of no stated length."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    names = sorted({name.decode() for name, _ in scope["headers"]})
    said = json.dumps(
        {"method": scope["method"], "path": scope["path"], "headers": names, "body": body.decode()}
    ).encode()
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said[:9], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await send({"type": "http.response.body", "body": said[9:]})
        return
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(said)).encode())]}
    )
    await send({"type": "http.response.body", "body": said})


@pytest.fixture(scope="module")
def port():
    with http_server(echo, FrontDoorProtocol) as url:
        yield int(url.rsplit(":", 1)[1])


def post(path=b"/echo", body=b'{"a": 1}', extra=b"", version=b"1.1"):
    head = b"POST %s HTTP/%s\r\nHost: h\r\n%sContent-Length: %d\r\n\r\n" % (path, version, extra, len(body))
    return head, body


def exchange(connection, *parts):
    """Send the parts one by one; the answer's status line, headers and body, which has a stated length."""
    for part in parts:
        connection.sendall(part)
        time.sleep(0.05)
    got = b""
    while b"\r\n\r\n" not in got:
        got += received(connection)
    head, _, body = got.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(headers[b"content-length"]):
        body += received(connection)
    return head.split(b"\r\n")[0], headers, json.loads(body)


def received(connection):
    data = connection.recv(65536)
    assert data, "the server closed the connection"
    return data


@pytest.fixture
def connection(port):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as made:
        yield made


@pytest.mark.parametrize("writes", [1, 2, 7])
def test_the_body_after_an_offer_to_upgrade_is_read(connection, writes):
    data = b"".join(post(extra=OFFER))
    step = -(-len(data) // writes)
    parts = list(post(extra=OFFER)) if writes == 2 else [data[i : i + step] for i in range(0, len(data), step)]
    status, headers, said = exchange(connection, *parts)
    assert status == b"HTTP/1.1 200 OK" and b"upgrade" not in headers
    assert said == {"method": "POST", "path": "/echo", "headers": ["content-length", "host"], "body": '{"a": 1}'}


def test_later_requests_of_the_connection_are_read_too(connection):
    """Plain, with an offer, chunked with an offer, and one in the same write as its predecessor."""
    assert exchange(connection, b"".join(post()))[2]["body"] == '{"a": 1}'
    assert exchange(connection, b"".join(post(body=b"[2]", extra=OFFER)))[2]["body"] == "[2]"
    chunked = b"POST /c HTTP/1.1\r\nHost: h\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n3\r\n[3]\r\n0\r\n\r\n"
    assert exchange(connection, chunked)[2]["body"] == "[3]"
    first, second = b"".join(post(body=b"[4]", extra=OFFER)), b"".join(post(path=b"/b?x=%20", body=b"[5]", extra=OFFER))
    connection.sendall(first + second)
    got = b""
    while b'"[5]"}' not in got:
        got += received(connection)
    assert got.index(b'"body": "[4]"') < got.index(b'"path": "/b"')
    assert exchange(connection, b"GET /last HTTP/1.1\r\nHost: h\r\n" + OFFER + b"\r\n")[2]["path"] == "/last"


def test_an_expected_100_is_sent_after_an_offer(connection):
    head, body = post(extra=OFFER + b"Expect: 100-continue\r\n")
    connection.sendall(head)
    assert received(connection) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert exchange(connection, body)[2]["body"] == '{"a": 1}'


def test_what_is_no_offer_that_anyone_takes(port):
    for request, status in (
        (b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            assert received(connection).split()[1] == status


@pytest.mark.parametrize("path", [b"/stream", b"/echo"])
def test_http_1_0_gets_no_chunks(port, path):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"".join(post(path=path, version=b"1.0")))
        got = b""
        while data := connection.recv(65536):
            got += data
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    assert json.loads(body)["body"] == '{"a": 1}'


def test_http_1_1_gets_chunks(connection):
    connection.sendall(b"".join(post(path=b"/stream")))
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        got += received(connection)
    assert b"transfer-encoding: chunked" in got.lower()


def test_only_the_offer_is_taken_out_of_a_head():
    headers = [
        (b"connection", b"Keep-Alive, Upgrade,HTTP2-Settings"),
        (b"upgrade", b"h2c"),
        (b"http2-settings", b"x"),
        (b"te", b"trailers"),
    ]
    assert without_upgrade(headers) == [(b"connection", b"Keep-Alive"), (b"te", b"trailers")]
    assert without_upgrade([(b"connection", b"upgrade"), (b"connection", b"close")]) == [(b"connection", b"close")]


def through_proxy(headers):
    """Headers that the application sees, and those of the response, where Serve and the application set an id each."""
    seen, sent = [], []

    async def inner(scope, receive, send):
        seen.extend(scope["headers"])
        given = dict(scope["headers"])[b"x-request-id"]
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"x-request-id", given), (b"a", b"1"), (b"X-Request-ID", given)],
            }
        )

    async def send(message):
        sent.extend(message["headers"])

    asyncio.run(ServeProxyMiddleware(inner)({"type": "http", "path": "/", "headers": headers}, None, send))  # type: ignore[arg-type]
    return seen, sent


STEERING = [
    b"X-Request-Timeout-Seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"Serve-Multiplexed-Model-Id",
    b"x-session-id",
    b"X_Session_ID",
    b"x-serve-router-replica",
    b"X_Serve_Router_anything",
]


def test_the_proxy_strips_headers_that_steer_serve():
    headers = [*((name, b"1") for name in STEERING), (b"accept", b"*/*"), (b"x-session", b"1")]
    seen, _ = through_proxy(headers)
    assert [name for name, _ in seen] == [b"accept", b"x-session", b"x-request-id"]


def test_they_are_the_ones_that_this_version_of_serve_reads():
    from ray.serve._private import constants

    names = [value for name, value in vars(constants).items() if name.endswith("_HEADER") and isinstance(value, str)]
    assert len(names) >= 3
    names += [constants.SERVE_MULTIPLEXED_MODEL_ID, constants.SERVE_SESSION_ID]
    names.append(constants.SERVE_INGRESS_ROUTER_HEADER_PREFIX + "x")
    assert [name for name in names if not steers_serve(name.encode())] == []


def test_the_proxys_list_of_applications_is_an_unknown_path():
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["path"])

    for path in ("/-/routes", "/-/healthz", "/v1/models"):
        scope = {"type": "http", "path": path, "headers": []}
        asyncio.run(ServeProxyMiddleware(inner)(scope, None, None))  # type: ignore[arg-type]
    assert seen == ["/-", "/-/healthz", "/v1/models"]


def test_the_server_as_a_whole_is_asked_with_options_alone():
    """By `*` in the place of a path, which Serve has no application for."""
    seen, sent = [], []

    async def inner(scope, receive, send):
        seen.append((scope["path"], scope["raw_path"]))

    async def send(message):
        sent.append(message)

    for method in ("OPTIONS", "GET"):
        scope = {"type": "http", "method": method, "path": "*", "raw_path": b"*", "headers": [(b"x-request-id", b"a")]}
        asyncio.run(ServeProxyMiddleware(inner)(scope, None, send))  # type: ignore[arg-type]
    start, body = sent
    assert start["status"] == 204 and body["body"] == b"" and seen == [("/*", b"/*")]
    assert dict(start["headers"]) == {b"allow": b"GET, HEAD, POST, DELETE, OPTIONS", b"x-request-id": b"a"}


@pytest.mark.parametrize("pieces", [1, 9])
@pytest.mark.parametrize("ends", [True, False])
def test_a_head_that_is_too_long_is_refused(port: int, pieces: int, ends: bool):
    """Whole or still coming, in one header or in many."""
    for name in (b"a: %s\r\n" % (b"x" * MAX_HEAD_BYTES), b"".join(b"h%d: 1234567\r\n" % i for i in range(5000))):
        sent = b"POST /echo HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n" + name + (b"\r\nabc" if ends else b"")
        step = -(-len(sent) // pieces)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            got = b""
            for at in range(0, len(sent), step):
                connection.sendall(sent[at : at + step])
            while part := connection.recv(65536):
                got += part
        assert got.startswith(b"HTTP/1.1 431 ") and got.count(b"HTTP/1.1") == 1
        assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


class _Connection(asyncio.Transport):
    """That of a client, in memory."""

    def __init__(self):
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = b""

    def write(self, data):
        self.written += data

    def can_write_eof(self):
        return False

    def is_closing(self):
        return False

    def close(self):
        pass

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


def in_pieces(*pieces):
    """What a client is answered that sends these, where each is read at once."""

    async def go():
        config = uvicorn.Config(echo, lifespan="off", log_level="warning")
        config.load()
        protocol, connection = FrontDoorProtocol(config, ServerState(), {}), _Connection()
        protocol.connection_made(connection)
        for piece in pieces:
            protocol.data_received(piece)
            await asyncio.sleep(0.1)
        protocol.connection_lost(None)
        return connection.written

    return asyncio.run(go())


def test_a_head_is_not_charged_with_the_requests_before_it():
    """Clients that do not wait for answers send the end of one request and the beginning of the next together."""
    head = b"GET /echo HTTP/1.1\r\nHost: h\r\na: %s\r\n\r\n" % (b"x" * 30_000)
    large = b"".join(post(body=b"x" * (MAX_HEAD_BYTES + 1)))
    for before in (head * 3, large):
        for cut in (1, 20, len(head) - 2):
            got = in_pieces(before + head[:cut], head[cut:] + head)
            answers = 2 + (3 if before == head * 3 else 1)
            assert got.count(b"HTTP/1.1 200 OK") == answers and b"431" not in got
    endless = b"GET /echo HTTP/1.1\r\nHost: h\r\na: " + b"x" * MAX_HEAD_BYTES
    for pieces in ((large + endless[:40], endless[40:] + b"xx"), (large + endless[:-9], endless)):
        got = in_pieces(*pieces)
        assert got.count(b"HTTP/1.1 200 OK") == 1 and got.count(b"HTTP/1.1 431 ") == 1


def test_a_head_that_is_just_short_enough_is_taken(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):  # each is counted by itself
            extra = b"a: %s\r\n" % (b"x" * (MAX_HEAD_BYTES - 1000))
            status, _, said = exchange(connection, b"".join(post(extra=extra)))
            assert status == b"HTTP/1.1 200 OK" and "a" in said["headers"]


class Hasty(FrontDoorProtocol):
    head_seconds = 0.4


@pytest.fixture(scope="module")
def hasty():
    with http_server(echo, Hasty) as url:
        yield "127.0.0.1", int(url.rsplit(":", 1)[1])


def until_its_end(connection):
    got, begin = b"", time.monotonic()
    while part := connection.recv(65536):
        got += part
    return got, time.monotonic() - begin


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"PO", b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Le"])
def test_a_connection_that_brings_no_whole_head_ends(hasty, sent):
    with socket.create_connection(hasty, timeout=5) as connection:
        connection.sendall(sent)
        got, seconds = until_its_end(connection)
    assert 0.2 < seconds < 3
    if not sent.strip():
        assert got == b""
        return
    head, _, said = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head
    assert json.loads(said)["error"]["code"] == "headers_timeout"


def test_a_head_that_drips_has_no_more_time_than_another(hasty):
    with socket.create_connection(hasty, timeout=5) as connection:
        begin = time.monotonic()
        with suppress(ConnectionResetError, BrokenPipeError):
            for byte in b"".join(post())[:40] * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize("rest", [b"\r\n", b"POST /echo HT"])
def test_the_next_head_of_a_connection_has_its_own_time(hasty, rest):
    """From when it begins; without this what follows an answer would call off uvicorn's own bound."""
    with socket.create_connection(hasty, timeout=5) as connection:
        for _ in range(3):
            assert exchange(connection, b"".join(post()))[2]["body"] == '{"a": 1}'
            time.sleep(0.3)  # uvicorn's bound of 5 s is on
        connection.sendall(rest)
        got, seconds = until_its_end(connection)
    assert 0.2 < seconds < 3 and got.startswith(b"HTTP/1.1 408 ") is (rest != b"\r\n")


def test_a_request_may_take_longer_than_a_head(hasty):
    head, body = post()
    with socket.create_connection(hasty, timeout=5) as connection:
        connection.sendall(head + body[:3])
        time.sleep(1)
        assert exchange(connection, body[3:])[2]["body"] == body.decode()


def test_one_request_id_comes_back():
    for given, kept in ((b"my-id.1", True), (b"a b", False), (b"\xff", False)):
        seen, sent = through_proxy([(b"x-request-id", given)])
        [one] = [value for name, value in sent if name.lower() == b"x-request-id"]
        assert [value for name, value in seen if name == b"x-request-id"] == [one] and (one == given) is kept
        assert (b"a", b"1") in sent


def test_servers_of_a_proxy_use_the_protocol(monkeypatch):
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    replies = [UnroutedMiddleware, LostReplicaMiddleware, HealthMiddleware]
    inside_out = [ProxyLineMiddleware, *replies, GateMiddleware, SlowClientMiddleware, ServeProxyMiddleware]
    assert [middleware.cls for middleware in serve_proxy_middlewares()] == inside_out
    config = uvicorn.Config(echo, log_level="warning")
    config.load()
    assert config.http_protocol_class is FrontDoorProtocol
