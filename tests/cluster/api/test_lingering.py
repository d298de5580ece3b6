"""Clients that write their whole request before they read anything, and are answered while they write."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import time
from functools import partial

import pytest
from api_keys import key_store, make_key
from certificates import make_certificate
from fake_engine import http_server

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.lingering import LingeringTransport
from isotherm.cluster.api.protocol import MAX_HEAD_BYTES, FrontDoorProtocol
from isotherm.cluster.api.settings import AppSettings

pytestmark = pytest.mark.slow

BODY = b" " * 20_000_000
JSON_TYPE = {"Content-Type": "application/json"}
CLOSE = {"Connection": "close"}  # as urllib has it in every request


def asked(connection, method="POST", path="/v1/completions", body=BODY, **headers):
    """The status and the error's code, of a client that reads nothing before it has written all."""
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"]["code"]


def connected(url):
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)


async def busy(scope, receive, send):
    """Answers at once, what its path says, and asks for nothing."""
    said = json.dumps({"error": {"code": "said"}}).encode()
    headers = [(b"content-length", str(len(said)).encode())]
    await send({"type": "http.response.start", "status": int(scope["path"][1:]), "headers": headers})
    await send({"type": "http.response.body", "body": said})


@pytest.fixture(scope="module")
def busy_url():
    with http_server(busy, FrontDoorProtocol) as url:
        yield url


@pytest.fixture
def served(engine, tokenizer, tmp_path):
    """With keys: the URL, and one of them."""
    key, entry = make_key("alice", roles=["use"])
    settings = AppSettings(max_body_bytes=100_000, keys=key_store(tmp_path / "keys.json", [entry]))
    with http_server(build_app(engine, tokenizer, "m", settings=settings), FrontDoorProtocol) as url:
        yield url, key


@pytest.mark.parametrize("headers", [{}, CLOSE], ids=["kept", "closed"])
@pytest.mark.parametrize(
    ("method", "path", "has_key", "expected"),
    [
        ("POST", "/v1/completions", True, (413, "request_too_large")),
        ("POST", "/v1/completions", False, (401, "missing_api_key")),
        ("POST", "/admin/operations", True, (403, "forbidden")),
        ("POST", "/nothing", True, (404, "not_found")),
        ("PUT", "/v1/models", True, (405, "method_not_allowed")),
    ],
)
def test_an_answer_before_the_body_is_read_reaches_its_client(served, method, path, has_key, expected, headers):
    url, key = served
    headers = JSON_TYPE | headers | ({"Authorization": f"Bearer {key}"} if has_key else {})
    for _ in range(3):
        assert asked(connected(url), method, path, **headers) == expected


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_so_does_any_other_status(busy_url, status):
    for _ in range(3):
        assert asked(connected(busy_url), path=f"/{status}", **CLOSE) == (status, "said")


def test_and_over_tls(tmp_path):
    """Which has no way to close one half."""
    certificate, key = make_certificate(tmp_path, "127.0.0.1")
    trust = ssl.create_default_context(cafile=str(certificate))
    files = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with http_server(busy, FrontDoorProtocol, **files) as url:
        address = url.removeprefix("http://")
        for _ in range(3):
            connection = http.client.HTTPSConnection(address, timeout=20, context=trust)
            assert asked(connection, path="/413", **CLOSE) == (413, "said")


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"POST /200 HTTP/1.1\r\nhost: h\r\na: " + b"x" * MAX_HEAD_BYTES, b"431"), (b"no HTTP\r\n\r\n", b"400")],
)
def test_so_does_that_a_head_cannot_be_taken(busy_url, head, status):
    for _ in range(3):
        with socket.create_connection(address_of(busy_url), timeout=20) as connection:
            connection.sendall(head + BODY)
            assert connection.recv(65536).split()[1] == status


def address_of(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


class Impatient(FrontDoorProtocol):
    linger = staticmethod(partial(LingeringTransport, seconds=1.0, silent_seconds=0.3, most_bytes=5_000_000))


@pytest.fixture(scope="module")
def impatient():
    with http_server(busy, Impatient) as url:
        yield address_of(url)


def answered(impatient):
    """A connection that has had its answer, and the end of what the server sends, and owes nearly all of its body."""
    connection = socket.create_connection(impatient, timeout=5)
    connection.sendall(b"POST /413 HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 1000000000\r\n\r\n")
    got = b""
    while part := connection.recv(65536):
        got += part
    assert got.startswith(b"HTTP/1.1 413 ")
    return connection


def seconds_of_sending(connection, size, pause):
    """Until the server takes nothing more."""
    begin = time.monotonic()
    with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while time.monotonic() < begin + 5:
            connection.sendall(b"x" * size)
            time.sleep(pause)
    return time.monotonic() - begin


def test_who_goes_on_sending_is_borne_for_so_long(impatient):
    assert 0.8 < seconds_of_sending(answered(impatient), 1, 0.05) < 2


def test_who_falls_silent_for_less_long(impatient):
    connection = answered(impatient)
    time.sleep(0.6)
    assert seconds_of_sending(connection, 1, 0.05) < 0.2


def test_and_who_sends_much_for_so_many_bytes(impatient):
    begin = time.monotonic()
    assert seconds_of_sending(answered(impatient), 1_000_000, 0) < 0.8, time.monotonic() - begin


class Transport(asyncio.Transport):
    """Of which only its end is seen."""

    def __init__(self):
        super().__init__()
        self.closed = False

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


def test_a_connection_without_a_request_ends_at_once():
    async def go():
        transport = Transport()
        LingeringTransport(transport, lambda: False).close()
        assert transport.closed

    asyncio.run(go())
