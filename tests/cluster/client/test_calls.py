"""The calls without any I/O: what they ask for, given these answers."""

from __future__ import annotations

import httpx
import pytest
from pydantic import BaseModel

from isotherm.cluster.client import APIError, ConnectionFailedError, OutputCutError, OutputInvalidError
from isotherm.cluster.client.calls import Calls, Pause
from isotherm.cluster.client.tries import Send


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
    seen: list[str] = []
    waiting = Calls("http://x", 0).wait_for_operation("o", 60.0, lambda operation: seen.append(operation["phase"]))
    asked, value = run(waiting, *looks)
    look = Send("GET", "/admin/operations/o")
    assert asked == [look, Pause(0.1), look, Pause(0.1), look] and value["phase"] == "rolled_back"
    assert seen == ["planned", "preparing"]


def test_a_request_is_tried_again_after_what_passes():
    busy = httpx.Response(503, headers={"retry-after": "7"}, json={})
    asked, value = run(Calls("http://x", 2).get("/status"), busy, httpx.ConnectError("refused"), ok(a=1))
    assert asked[0] == asked[2] == asked[4] == Send("GET", "/status") and value == {"a": 1}
    assert asked[1] == Pause(7.0) and isinstance(asked[3], Pause) and 0.25 <= asked[3].seconds <= 0.5
    with pytest.raises(ConnectionFailedError, match="http://x: refused"):
        run(Calls("http://x", 0).get("/status"), httpx.ConnectError("refused"))
    with pytest.raises(APIError):
        run(Calls("http://x", 1).get("/status"), busy, busy)


def test_a_server_without_a_model_is_told():
    with pytest.raises(APIError, match="lists no model"):
        run(Calls("http://x", 0).chat("hi", {}), ok(data=[]))


def test_fields_without_a_name_here_are_sent():
    asked, _ = run(Calls("http://x", 0).chat("hi", {"model": "m", "extra_body": {"top_a": 1}}), ok(choices=[{}]))
    assert asked[0].body == {"messages": [{"role": "user", "content": "hi"}], "model": "m", "top_a": 1}


def test_a_streamed_request_asks_for_its_usage_and_keeps_what_is_asked():
    calls = Calls("http://x", 0)
    params = {"model": "m", "stream_options": {"timings": True}}
    asked, request = run(calls.stream_request(calls.chat_request("hi", params)))
    assert asked == [] and request.body["stream"] is True
    assert request.body["stream_options"] == {"include_usage": True, "timings": True}


class Answer(BaseModel):
    total: int


def reply(text, reason="stop"):
    return ok(choices=[{"message": {"content": text}, "finish_reason": reason}])


def test_parse_asks_for_the_type_and_gives_its_value():
    asked, value = run(Calls("http://x", 0).parse("hi", Answer, {"model": "m", "n": 1}), reply('{"total": 7}'))
    assert value == Answer(total=7)
    assert asked[0].body["response_format"]["json_schema"]["schema"]["required"] == ["total"]
    parse = Calls("http://x", 0).parse
    with pytest.raises(OutputCutError, match="max_tokens") as info:
        run(parse("hi", Answer, {"model": "m"}), reply('{"tot', "length"))
    assert info.value.text == '{"tot'
    with pytest.raises(OutputInvalidError, match="total"):
        run(parse("hi", Answer, {"model": "m"}), reply('{"total": "x"}'))
    with pytest.raises(ValueError, match="n is 2"):
        run(parse("hi", Answer, {"model": "m", "n": 2}))


def test_functions_are_sent_as_tools():
    def weather(city: str) -> str:
        return city

    entry = {"type": "function", "function": {"name": "other"}}
    asked, _ = run(Calls("http://x", 0).chat("hi", {"model": "m", "tools": [weather, entry]}), reply("7"))
    assert [one["function"]["name"] for one in asked[0].body["tools"]] == ["weather", "other"]


def test_a_parameter_that_nobody_knows_is_an_error_before_anything_is_asked():
    """A server takes no notice of it."""
    calls = Calls("http://x", 0)
    with pytest.raises(TypeError, match=r"unknown parameter 'temprature' \(did you mean 'temperature'\?\)"):
        run(calls.chat("hi", {"temprature": 0}))
    with pytest.raises(TypeError, match=r"'tools'.*extra_body"):
        run(calls.complete("hi", {"tools": []}))
    asked, _ = run(
        calls.chat("hi", {"model": "m", "extra_body": {"new": 1}}), ok(choices=[{"message": {"content": ""}}])
    )
    assert asked[0].body["new"] == 1
