"""Whether a served model answers over HTTP."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from certificates import make_certificate

from isotherm.cluster.deploy import first_answer
from isotherm.cluster.deploy.first_answer import Asked, NoAnswerError, wait_for_answer

pytestmark = pytest.mark.slow


@contextmanager
def server(
    *statuses: int | None, context: ssl.SSLContext | None = None, key: str | None = None
) -> Iterator[tuple[str, list[dict]]]:
    """Answers with these statuses in turn, the last one again and again; None: not at all. Over TLS with a `context`;
    with a `key` 401 to whoever has another."""
    asked: list[dict] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status = statuses[min(len(asked), len(statuses)) - 1]
            if key is not None and self.headers["authorization"] != f"Bearer {key}":
                status = 401
            if status is None:
                over.wait(10)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"words")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        if context is not None:
            httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"{'http' if context is None else 'https'}://127.0.0.1:{httpd.server_port}", asked
        over.set()
        httpd.shutdown()


def test_it_waits_until_a_token_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server(404, 503, 429, 500, 200) as (url, asked):
        wait_for_answer(Asked(url, "m"), 20)
    assert len(asked) == 5 and asked[0]["model"] == "m" and asked[0]["max_tokens"] == 1


def test_a_request_that_hangs_is_sent_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_answer, "ATTEMPT_SECONDS", 0.3)
    with server(None, 200) as (url, asked):
        wait_for_answer(Asked(url, "m"), 20)
    assert len(asked) == 2


@pytest.mark.parametrize(("statuses", "words"), [((503,), "HTTP 503: words"), ((None,), "timed out")])
def test_it_does_not_wait_for_ever(statuses: tuple, words: str):
    with (
        server(*statuses) as (url, _),
        pytest.raises(NoAnswerError, match=f"no request to {url}/v1/completions .*{words}"),
    ):
        wait_for_answer(Asked(url, "m"), 0.6)


def test_a_refusal_for_good_is_said_at_once():
    with server(401) as (url, asked), pytest.raises(NoAnswerError, match="HTTP 401: words"):
        wait_for_answer(Asked(url, "m"), 60)
    assert len(asked) == 1


def tls(folder: Path) -> tuple[ssl.SSLContext, str]:
    """A server's context, and the file of its certificate, which has another name in it."""
    certificate, key = make_certificate(folder, "10.9.8.7")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, str(certificate)


def test_it_asks_with_its_key_and_over_tls_whoever_has_the_certificate_alone(tmp_path: Path):
    context, certificate = tls(tmp_path)
    with server(200, context=context, key="k") as (url, asked):
        wait_for_answer(Asked(url, "m", "k", certificate), 20)
        assert len(asked) == 1
        with pytest.raises(NoAnswerError, match="HTTP 401"):
            wait_for_answer(Asked(url, "m", "other", certificate), 20)
        (tmp_path / "other").mkdir()
        _, other = tls(tmp_path / "other")
        with pytest.raises(NoAnswerError, match="certificate verify failed"):
            wait_for_answer(Asked(url, "m", "k", other), 0.5)


def test_nobody_there():
    with pytest.raises(NoAnswerError, match="refused"):
        wait_for_answer(Asked("http://127.0.0.1:1", "m"), 0.5)
