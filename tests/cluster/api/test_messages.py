"""Anthropic's /v1/messages, through the unmodified anthropic client."""

from __future__ import annotations

import asyncio
import json

import anthropic
import httpx
import pytest
from pydantic import BaseModel
from scripted import MODEL, Scripted, load_tokenizer, scripted_server, written_call

from isotherm.cluster.api.settings import AppSettings

USER = [{"role": "user", "content": "hi"}]
THINKING = {"chat_template_kwargs": {"thinking": True}}
TOOLS = [{"name": name, "input_schema": {"type": "object", "properties": {"a": {}}}} for name in "fg"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    loaded = load_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    yield loaded
    loaded.chat_template.close()


@pytest.fixture(scope="module")
def served(tokenizer):
    return Scripted(tokenizer)


@pytest.fixture
def engine(served):
    served.fail_after, served.unavailable, served.full, served.per_delta, served.script = None, "", "", 1, []
    return served


@pytest.fixture(scope="module")
def url(served):
    with scripted_server(served) as url:
        yield url


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="mine", max_retries=0) as client:
        yield client


def with_defaults(fields):
    """The client does not know `temperature` any more; older ones send it."""
    others = {"temperature": 0, **fields.get("extra_body", {})}
    return {"model": MODEL, "messages": USER, "max_tokens": 400, **fields, "extra_body": others}


def ask(client, **fields):
    return client.messages.create(**with_defaults(fields))


def streamed(client, **fields):
    """All events as they are on the wire, and the message that the client makes of them."""
    raw = list(client.messages.create(**with_defaults(fields), stream=True))
    with client.messages.stream(**with_defaults(fields)) as stream:
        return raw, stream.get_final_message()


def contents(message):
    return [block.to_dict() for block in message.content]


def text(words):
    return {"type": "text", "text": words}


def test_a_whole_message(client, engine):
    engine.say("the quick brown fox")
    message = ask(client, system="be brief", metadata={"user_id": "me"})
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_") and message._request_id
    assert [block.text for block in message.content] == ["the quick brown fox"]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert engine.prompt == "[system]be brief[user]hi[assistant]" and engine.seen[-1].key == ""
    prompt_tokens, used = len(engine.seen[-1].prompt), message.usage
    assert used.input_tokens + used.cache_read_input_tokens == prompt_tokens
    assert used.cache_read_input_tokens == prompt_tokens // 2 and used.output_tokens == len(engine.script)
    assert used.output_tokens_details.thinking_tokens == 0
    assert ask(client, model="claude-x").model == "claude-x"


def test_models(client):
    models = list(client.models.list())
    assert [model.id for model in models] == [MODEL, "claude-x"]
    one = client.models.retrieve("claude-x")
    assert (one.type, one.display_name, one.created_at) == ("model", "claude-x", models[0].created_at)


def test_why_it_stopped(client, engine):
    engine.say("one two three four")
    for stream in (False, True):

        def stopped(stream=stream, **fields):
            message = streamed(client, **fields)[1] if stream else ask(client, **fields)
            said = "".join(block.text for block in message.content)
            return said, message.stop_reason, message.stop_sequence

        assert stopped(stop_sequences=["zzz", "o t"]) == ("one tw", "stop_sequence", "o t")
        assert stopped(stop_sequences=["zzz"])[1:] == ("end_turn", None)
        assert stopped(max_tokens=2)[1:] == ("max_tokens", None)
        engine.script = engine.script[:-1]  # without an end
        assert stopped(max_tokens=20_000)[1:] == ("model_context_window_exceeded", None)
        engine.say("one two three four")


def test_events_come_in_order_and_make_the_whole(client, engine):
    engine.say("hmm</think>\n\n7 it is")
    engine.per_delta = 2
    whole = ask(client, extra_body=THINKING)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert (whole.content[0].thinking, whole.content[1].text) == ("hmm", "\n\n7 it is")
    events, message = streamed(client, extra_body=THINKING)
    kinds = [event.type for event in events]
    assert [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert contents(message) == contents(whole) and message.usage == whole.usage
    assert message.stop_reason == whole.stop_reason == "end_turn"
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == "\n\n7 it is"
    assert "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta") == "hmm"
    assert events[0].message.usage.input_tokens == whole.usage.input_tokens
    assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens


def test_tool_use(client, engine):
    first, second = written_call("f", '{"a": {"b": [1, "ü"]}}'), written_call("g", "{}")
    engine.say(f"hm</think>\n{first}\n{second}")
    fields = {"tools": TOOLS, "extra_body": THINKING}
    whole = ask(client, **fields)
    assert [block.type for block in whole.content] == ["thinking", "tool_use", "tool_use"]
    _, f, g = whole.content
    assert (f.name, f.input, g.name, g.input) == ("f", {"a": {"b": [1, "ü"]}}, "g", {}) and f.id != g.id
    assert whole.stop_reason == "tool_use"
    events, message = streamed(client, **fields)
    assert message.stop_reason == "tool_use" and [block.type for block in message.content] == [
        block.type for block in whole.content
    ]
    assert [block.input for block in message.content[1:]] == [f.input, g.input]
    pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta" and e.index == 1]
    assert json.loads("".join(pieces)) == f.input and len(pieces) > 2
    one = ask(client, **fields, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["thinking", "tool_use"]
    none = ask(client, **fields, tool_choice={"type": "none"})
    assert [block.type for block in none.content] == ["thinking", "text"] and none.stop_reason == "end_turn"


def test_refusals_of_tools_name_the_routes_own_field(client):
    for fields, said in (
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools:"),
        ({"tools": [TOOLS[1], {"name": "f", "input_schema": {"type": "array"}}]}, "tools[1].input_schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "z"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ):
        with pytest.raises(anthropic.BadRequestError) as info:
            ask(client, **fields)
        assert info.value.body["error"]["message"].startswith(said)


def test_a_tool_loop(client, engine):
    engine.say("hm</think>look:" + written_call("f", '{"a": 1}'))
    first = ask(client, tools=TOOLS, extra_body=THINKING)
    engine.say("it is 7")
    call = first.content[2].id
    result = {"type": "tool_result", "tool_use_id": call, "content": "7"}
    turns = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert ask(client, messages=turns).content[0].text == "it is 7"
    assert engine.prompt == f'[user]hi[assistant](hm)look:<{call} f {{"a": 1}}>[tool {call}]7[assistant]'


class Sum(BaseModel):
    total: int


def test_structured_text(client, engine):
    engine.say('{"total": 7}')
    parsed = client.messages.parse(model=MODEL, max_tokens=50, messages=USER, output_format=Sum)
    assert parsed.parsed_output == Sum(total=7)
    constraint = engine.seen[-1].params.constraint
    assert constraint is not None and "total" in constraint.grammar
    wrong = {"format": {"type": "json_schema", "schema": {"type": "object", "if": {"type": "nope"}}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config.format.schema"):
        ask(client, output_config=wrong)


def test_thinking_is_turned_on_and_off(client, engine):
    engine.say("hm</think>7")
    on = ask(client, thinking={"type": "enabled", "budget_tokens": 300})
    assert engine.prompt.endswith("<think>") and [block.type for block in on.content] == ["thinking", "text"]
    assert engine.seen[-1].params.max_thinking_tokens == 300
    for stream in (False, True):
        hidden = {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "low"}}
        message = streamed(client, **hidden)[1] if stream else ask(client, **hidden)
        assert engine.prompt.endswith("<think>") and [block.type for block in message.content] == ["text"]
    ask(client, thinking={"type": "disabled"}, output_config={"effort": "high"})
    assert engine.prompt.endswith("[assistant]")


def test_the_last_turn_of_the_assistant_is_gone_on_with(client, engine):
    engine.say("42)")
    message = ask(client, messages=[*USER, {"role": "assistant", "content": "The answer is ("}])
    assert engine.prompt.endswith("[assistant]The answer is (") and message.content[0].text == "42)"


def test_tokens_are_counted_as_they_will_be_used(client, engine):
    engine.say("yes")
    for fields in (
        {},
        {"system": "be brief"},
        {"system": [text("a"), text("b")], "messages": [*USER, {"role": "assistant", "content": "x"}, *USER]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "disabled"}},
    ):
        counted = client.messages.count_tokens(**{"model": MODEL, "messages": USER, **fields}).input_tokens
        used = ask(client, **{**fields, "max_tokens": 2000}).usage
        assert counted == used.input_tokens + used.cache_read_input_tokens == len(engine.seen[-1].prompt)
    seen = len(engine.seen)
    long = [{"role": "user", "content": "the quick brown fox " * 200}]
    assert client.messages.count_tokens(model=MODEL, messages=long).input_tokens > engine.max_model_len
    assert len(engine.seen) == seen
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="nope", messages=USER)


def test_errors_have_anthropics_form(client, engine, url):
    for fields, said in (
        ({"extra_body": {"temperature": 3}}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "prompt is too long: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 400}}, "thinking.budget_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"metadata": {"user_id": "x" * 600}}, "metadata.user_id"),
        ({"extra_body": {"chat_template_kwargs": 5}}, "chat_template_kwargs"),
    ):
        with pytest.raises(anthropic.BadRequestError) as info:
            ask(client, **fields)
        error = info.value.body
        assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
        assert error["error"]["message"].startswith(said)
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(client, model="nope")
    assert missing.value.body["error"]["type"] == "not_found_error" and missing.value.request_id
    for method, path, status, kind in (
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages/nope", 404, "not_found_error"),
    ):
        answer = httpx.request(method, url + path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert "type" in httpx.get(url + "/v1/nope").json()["error"] and "type" not in httpx.get(url + "/v1/nope").json()


def test_errors_of_the_engine(client, engine):
    engine.unavailable = "no shard"
    with pytest.raises(anthropic.InternalServerError) as away:
        ask(client)
    assert away.value.body["error"] == {"type": "overloaded_error", "message": "no shard"}
    assert (away.value.status_code, away.value.response.headers["retry-after"]) == (503, "1")
    engine.unavailable, engine.full = "", "256 are running"
    with pytest.raises(anthropic.RateLimitError) as full:
        ask(client, stream=True)
    assert full.value.body["error"]["type"] == "rate_limit_error"
    engine.full, engine.fail_after = "", 3
    with pytest.raises(anthropic.InternalServerError, match="forward pass") as failed:
        ask(client)
    assert failed.value.body["error"]["type"] == "api_error"
    with pytest.raises(anthropic.APIStatusError, match="forward pass"):
        list(ask(client, stream=True))


def test_a_stream_that_waits_has_pings(tokenizer):
    engine = Scripted(tokenizer)
    engine.say("yes")
    engine.delay_s = 0.2
    with scripted_server(engine, AppSettings(first_event_s=0.02, silence_s=0.05)) as url:
        body = {"model": MODEL, "max_tokens": 5, "messages": USER, "stream": True}
        headers = {"x-api-key": "x", "anthropic-version": "2023-06-01"}
        raw = httpx.post(url + "/v1/messages", json=body, headers=headers)
        assert raw.status_code == 200 and raw.text.startswith('event: ping\ndata: {"type":"ping"}\n\n')
        with anthropic.Anthropic(base_url=url, api_key="x") as client:
            assert [event.type for event in ask(client, stream=True)][-1] == "message_stop"


def test_a_client_that_vanishes_ends_its_stream(tokenizer):
    engine = Scripted(tokenizer)
    engine.max_model_len, engine.delay_s = 100_000, 0.01
    with scripted_server(engine) as url, anthropic.Anthropic(base_url=url, api_key="x") as client:
        with client.messages.stream(**with_defaults({"max_tokens": 90_000})) as stream:
            next(stream)
            assert len(engine.open) == 1
        for _ in range(500):
            if not engine.open:
                break
            asyncio.run(asyncio.sleep(0.01))
        assert not engine.open and engine.closed_early == 1


def test_the_async_client(url, engine):
    engine.say("the quick brown fox")

    async def go():
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="x") as client,
            client.messages.stream(**with_defaults({})) as stream,
        ):
            return await stream.get_final_text()

    assert asyncio.run(go()) == "the quick brown fox"
