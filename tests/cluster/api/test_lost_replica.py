"""Requests whose ingress replica is lost: a 503 that says when to ask again, or an error event; never silence."""

from __future__ import annotations

import asyncio
import json

import pytest

from isotherm.cluster.api.lost_replica import LostReplicaMiddleware
from isotherm.cluster.api.replies import sse

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
PIECE = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
JSON_START = START | {"headers": [(b"content-type", b"application/json")]}
SERVES_OWN = {
    "type": "http.response.start",
    "status": 503,
    "headers": [(b"content-type", b"text/plain; charset=utf-8")],
}


def replies(*messages, error=None, path="/v1/completions", method="POST"):
    """What a client gets where the proxy sends these messages, and then no more."""
    sent = []

    async def proxy(scope, receive, send):
        for message in messages:
            await send(message)
        if error is not None:
            raise error

    async def send(message):
        sent.append(message)

    asyncio.run(LostReplicaMiddleware(proxy)({"type": "http", "path": path, "method": method}, None, send))
    return sent


@pytest.mark.parametrize(
    "messages",
    [(), (SERVES_OWN, {"type": "http.response.body", "body": b"died"}), (SERVES_OWN | {"status": 500}, PIECE)],
)
def test_a_reply_that_has_not_begun_is_a_503(messages):
    start, body = replies(*messages)
    headers = dict(start["headers"])
    assert start["status"] == 503 and headers[b"retry-after"] == b"1"
    assert json.loads(body["body"])["error"]["code"] == "unavailable" and not body["more_body"]


@pytest.mark.parametrize(
    "path, event, key",
    [
        ("/v1/completions", b"data: ", "error"),
        ("/v1/messages", b"event: error\ndata: ", "error"),
        ("/v1/responses", b"event: error\ndata: ", "message"),
    ],
)
@pytest.mark.parametrize("error", [None, RuntimeError("the replica died")])
def test_a_stream_that_has_begun_ends_with_an_error_event(path, event, key, error):
    *begun, last = replies(START, PIECE, error=error, path=path)
    assert begun == [START, PIECE] and not last["more_body"]
    assert last["body"].startswith(event) and last["body"].endswith(b"\n\n")
    assert key in json.loads(last["body"].removeprefix(event))


@pytest.mark.parametrize("size", [1, 7, 9, 10_000])
@pytest.mark.parametrize("path", ["/v1/responses", "//v1/responses/"])
def test_the_error_of_a_response_is_the_next_event_in_both_of_openais_forms(size, path):
    """The AI SDK takes none without a number, and reads the nested one; however the stream is cut."""
    kinds = ["response.created", "response.in_progress", "response.output_text.delta"]
    stream = b": waiting\n\n" + b"".join(sse({"type": kind, "delta": "\n\nevent: x"}, kind) for kind in kinds)
    pieces = [PIECE | {"body": stream[i : i + size]} for i in range(0, len(stream), size)]
    *_, last = replies(START, *pieces, path=path)
    said = json.loads(last["body"].removeprefix(b"event: error\ndata: "))
    wrong = {"code": "server_error", "message": said["message"], "param": None}
    nested = {"type": "server_error", **wrong}
    assert said == {"type": "error", "sequence_number": 3, **wrong, "error": nested} and "lost" in said["message"]


def test_surplus_slashes_change_no_form():
    (start, body), *_ = [replies(path="//v1/messages")]
    assert start["status"] == 503 and json.loads(body["body"])["type"] == "error"
    *_, last = replies(START, PIECE, path="/v1//messages")
    assert last["body"].startswith(b"event: error\ndata: ")


def test_what_is_whole_stays_as_it_is():
    last = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
    assert replies(START, PIECE, last) == [START, PIECE, last]
    refused = JSON_START | {"status": 503}
    assert replies(refused, last) == [refused, last], "a 503 of ours"


def test_other_replies_that_are_cut_stay_cut():
    assert replies(JSON_START, PIECE) == [JSON_START, PIECE]
    assert replies(START, PIECE, path="/admin/events", method="GET") == [START, PIECE], "whose readers come again"
    with pytest.raises(RuntimeError):
        replies(JSON_START, PIECE, error=RuntimeError("the replica died"))


def test_a_client_that_has_gone_is_told_nothing():
    with pytest.raises(asyncio.CancelledError):
        replies(START, PIECE, error=asyncio.CancelledError())
