"""Where `isotherm top` has what it shows from: the event stream, and what becomes of it where that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from isotherm.cluster.cli.looks import ASKED, Sample, looks
from isotherm.cluster.client import APIError, Client

STATUS = {"workers": [], "controller": {"phase": "serving"}, "placement_version": 1, "model": {"id": "m"}}


def part(values: dict[str, Any]) -> bytes:
    return f"id: e:1\nevent: snapshot\ndata: {json.dumps({'set': values, 'gone': []})}\n\n".encode()


class Server:
    def __init__(self, *streams: httpx.Response, status: int = 200) -> None:
        self.streams, self.status = list(streams), status
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path)
        if request.url.path == "/admin/events":
            return self.streams.pop(0)
        if request.url.path == "/admin/autoscaler":
            return httpx.Response(404, json={"error": {"message": "there is none"}})
        found = STATUS if request.url.path == "/status" else {"layers": []}
        return httpx.Response(self.status, json=found if self.status == 200 else {"error": {"message": "no"}})


def found_by(server: Callable[[httpx.Request], httpx.Response], count: int) -> list[Sample | str]:
    with Client("http://h", transport=httpx.MockTransport(server), max_retries=0) as client:
        looked = looks(client, 0.5, lambda seconds: None)
        return [next(looked) for _ in range(count)]


def refused(status: int) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "not now"}})


def test_a_stream_that_is_refused_is_tried_again_after_some_looks():
    server = Server(refused(429), httpx.Response(200, content=part({"cluster": STATUS})))
    *asked, told = found_by(server, ASKED + 1)
    notes = {found.note for found in asked if isinstance(found, Sample)}
    assert notes == {"asking every 0.5 s; the event stream cannot be read: HTTP 429: not now"}
    assert isinstance(told, Sample) and told.note == "" and told.autoscaler is None and told.status["workers"] == []
    assert server.asked.count("/admin/events") == 2 and server.asked.count("/status") == ASKED


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_not_look_is_told_at_once(status):
    server = Server(refused(status))
    with pytest.raises(APIError, match=f"HTTP {status}: not now"):
        found_by(server, 1)
    assert server.asked == ["/admin/events"]


def test_what_is_another_server():
    page = httpx.Response(200, content=b"<html>")
    with pytest.raises(APIError, match="HTTP 404: no"):
        found_by(Server(page, status=404), 1)
    with pytest.raises(APIError, match="HTTP 404: no"):
        found_by(Server(refused(404), status=404), 1)


def test_what_fails_later_is_told_and_tried_again():
    """Also where the key is refused later: it may be given back."""
    stream = httpx.Response(200, content=part({"cluster": STATUS}))
    first, ended, why, again = found_by(Server(stream, refused(403), httpx.Response(200, content=stream.content)), 4)
    assert isinstance(first, Sample) and isinstance(again, Sample)
    assert ended == "the server has ended its event stream" and why == "HTTP 403: not now"


def test_a_part_without_the_cluster_is_waited_over():
    stream = httpx.Response(200, content=part({"layer/1": {"layer": 1}}) + part({"cluster": STATUS}))
    (found,) = found_by(Server(stream), 1)
    assert isinstance(found, Sample) and found.status["model"] == {"id": "m"}
