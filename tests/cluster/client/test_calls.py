"""The calls without any I/O: what they ask for, given these answers."""

from __future__ import annotations

import httpx
import pytest

from isotherm.cluster.client import APIError, ConnectionFailedError
from isotherm.cluster.client.calls import Calls, Pause, Send, Tries


def run(call, *answers):
    """What the call asked for, and its value. An answer is a response, an error, or None after a pause."""
    asked, left = [], list(answers)
    try:
        step = next(call)
        while True:
            asked.append(step)
            answer = None if isinstance(step, Pause) else left.pop(0)
            step = call.throw(answer) if isinstance(answer, Exception) else call.send(answer)
    except StopIteration as end:
        assert not left
        return asked, end.value


def ok(**body):
    return httpx.Response(200, json=body)


def test_the_model_is_asked_for_once():
    calls = Calls("http://x", 0)
    reply = {"choices": [{"message": {"content": "7"}}]}
    asked, value = run(calls.chat("hi", {"n": 1}), ok(data=[{"id": "m"}]), ok(**reply))
    said = [{"role": "user", "content": "hi"}]
    assert asked == [
        Send("GET", "/v1/models"),
        Send("POST", "/v1/chat/completions", {"messages": said, "n": 1, "model": "m"}),
    ]
    assert value.text == "7"
    asked, _ = run(calls.complete("hi", {}), ok(**reply))
    assert asked == [Send("POST", "/v1/completions", {"prompt": "hi", "model": "m"})]


def test_an_operation_is_looked_at_until_it_has_ended():
    looks = ok(id="o", phase="planned"), ok(id="o", phase="preparing"), ok(id="o", phase="rolled_back")
    asked, value = run(Calls("http://x", 0).wait_for_operation("o", 60.0), *looks)
    look = Send("GET", "/admin/operations/o")
    assert asked == [look, Pause(0.1), look, Pause(0.1), look] and value["phase"] == "rolled_back"


def test_a_request_is_tried_again_after_what_passes():
    busy = httpx.Response(503, headers={"retry-after": "7"}, json={})
    asked, value = run(Calls("http://x", 2).get("/status"), busy, httpx.ConnectError("refused"), ok(a=1))
    assert asked[0] == asked[2] == asked[4] == Send("GET", "/status") and value == {"a": 1}
    assert asked[1] == Pause(7.0) and isinstance(asked[3], Pause) and 0.25 <= asked[3].seconds <= 0.5
    with pytest.raises(ConnectionFailedError, match="http://x: refused"):
        run(Calls("http://x", 0).get("/status"), httpx.ConnectError("refused"))
    with pytest.raises(APIError):
        run(Calls("http://x", 1).get("/status"), busy, busy)


def test_waits_grow_up_to_a_limit():
    tries = Tries("", 50)
    pauses = [tries.after_error(httpx.ReadError("reset")) for _ in range(40)]
    assert pauses[0] <= 0.25 and min(pauses[10:]) >= 15.0 and max(pauses) <= 30.0
    with pytest.raises(ConnectionFailedError, match="slow"):
        tries.after_error(httpx.ReadTimeout("slow"))
