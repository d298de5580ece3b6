"""Whether a served model answers over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from isotherm.cluster.deploy import first_answer
from isotherm.cluster.deploy.first_answer import Asked, NoAnswerError, wait_for_answer


@contextmanager
def server(*statuses: int | None) -> Iterator[tuple[str, list[dict]]]:
    """Answers with these statuses in turn, the last one again and again; None: not at all."""
    asked: list[dict] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status = statuses[min(len(asked), len(statuses)) - 1]
            if status is None:
                over.wait(10)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"words")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
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


def test_nobody_there():
    with pytest.raises(NoAnswerError, match="refused"):
        wait_for_answer(Asked("http://127.0.0.1:1", "m"), 0.5)
