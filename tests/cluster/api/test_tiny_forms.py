"""What the bundled model must say and must not, through every route: calls that a stop string cuts, and grammars that
bans leave nothing, or that grow too large."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from local_client import TINY, LocalClient

from isotherm.actors.attention import grammar_state
from isotherm.cluster.api.app import build_app
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ASKED = [{"role": "user", "content": "What is 3 + 4?"}]
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CHAT = {"messages": ASKED, "max_tokens": 60}
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "An object: ", "max_tokens": 60},
    "/v1/responses": {"input": ASKED, "max_output_tokens": 60},
    "/v1/messages": CHAT,
}
TOOLS = {
    "/v1/chat/completions": {
        "tools": [{"type": "function", "function": {"name": "add", "parameters": ADD}}],
        "tool_choice": "required",
    },
    "/v1/responses": {"tools": [{"type": "function", "name": "add", "parameters": ADD}], "tool_choice": "required"},
    "/v1/messages": {"tools": [{"name": "add", "input_schema": ADD}], "tool_choice": {"type": "any"}},
}


@pytest.fixture(scope="module")
def app():
    tokenizer = Tokenizer.load(TINY)
    yield build_app(LocalClient(), tokenizer, "tiny")
    tokenizer.chat_template.close()


def post(app, route, **fields):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(route, json={"model": "tiny", "temperature": 0, **ROUTES[route], **fields})

    return asyncio.run(go())


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def call(app, route, **fields):
    stop = {"stop_sequences" if route == "/v1/messages" else "stop": ["3"]}
    return post(app, route, **TOOLS[route], **stop, **fields)


def test_a_chats_call_that_a_stop_string_cuts_is_not_told_as_finished(app):
    (choice,) = call(app, "/v1/chat/completions").json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": '
    streamed = events(call(app, "/v1/chat/completions", stream=True))
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed][-1] == "stop"
    (whole,) = post(app, "/v1/chat/completions", **TOOLS["/v1/chat/completions"]).json()["choices"]
    assert whole["finish_reason"] == "tool_calls"


def test_a_messages_call_that_a_stop_string_cuts_names_the_string(app):
    message = call(app, "/v1/messages").json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "3")
    assert [block["input"] for block in message["content"]] == [{}]
    stopped = next(
        event for event in events(call(app, "/v1/messages", stream=True)) if event["type"] == "message_delta"
    )
    assert stopped["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "3"}
    assert post(app, "/v1/messages", **TOOLS["/v1/messages"]).json()["stop_reason"] == "tool_use"


def test_a_response_whose_call_a_stop_string_cuts_is_incomplete(app):
    *_, last = events(call(app, "/v1/responses", stream=True))
    assert last["type"] == "response.incomplete"
    for response in (call(app, "/v1/responses").json(), last["response"]):
        assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "stop"}
        assert [(item["status"], item["arguments"]) for item in response["output"]] == [("incomplete", '{"a": ')]
    whole = post(app, "/v1/responses", **TOOLS["/v1/responses"]).json()
    assert whole["status"] == "completed" and whole["output"][-1]["status"] == "completed"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("held", [{"guided_json": ADD}, "tools"])
def test_bans_that_leave_a_grammar_nothing_are_the_requests_fault(app, route, held):
    if held == "tools" and route not in TOOLS:
        return
    fields = {"bad_words": ["a"], **(TOOLS[route] if held == "tools" else held)}
    answer = post(app, route, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    said = error["message"]
    assert said.startswith("bad_words: no token can come after ") and "lark" not in said and "json_schema" not in said
    assert error.get("param", "bad_words") == "bad_words"
    *_, last = events(post(app, route, **fields, stream=True)) or [post(app, route, **fields, stream=True).json()]
    if last.get("type") == "response.failed":
        assert last["response"]["error"] == {"code": "invalid_prompt", "message": said}
    else:
        assert last["error"] == error


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("held", ["guided_json", "tools"])
def test_a_grammar_that_grows_too_large_is_the_requests_fault(app, route, held, monkeypatch: pytest.MonkeyPatch):
    if held == "tools" and route not in TOOLS:
        return
    why = "it never ends, or allows too much at once"
    monkeypatch.setattr(grammar_state, "error_of", lambda matcher: why)  # as some way into a text that nobody has tried
    answer = post(app, route, **(TOOLS[route] if held == "tools" else {held: ADD}))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == f"{held}: no token can come after 0 tokens of output: {why}"
    assert error.get("param", held) == held


def test_what_breaks_beside_a_grammar_is_ours(app, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar_state.GrammarState, "_begin", lambda self, compiled: 1 / 0)
    answer = post(app, "/v1/chat/completions", guided_json=ADD)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "generation_failed"
    assert "ZeroDivisionError" in answer.json()["error"]["message"]


def test_other_letters_for_a_bad_word_can_still_come(app):
    """Its tokens are banned, as it stands and after a space: what docs/api.md says."""
    (choice,) = post(
        app, "/v1/chat/completions", bad_words=["ello"], messages=[{"role": "user", "content": "Hello!"}]
    ).json()["choices"]
    assert "ello" in choice["message"]["content"]
