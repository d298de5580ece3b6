"""/v1/responses, through the unmodified openai client."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from pydantic import BaseModel
from scripted import MODEL, Scripted, load_tokenizer, scripted_server, written_call

from isotherm.cluster.api.settings import AppSettings

THINKING = {"chat_template_kwargs": {"thinking": True}}
TOOLS: list = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {"a": {}}}, "strict": False}
    for name in "fg"
]


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
    with scripted_server(served, AppSettings(kept_response_bytes=1 << 20)) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="mine", max_retries=0) as client:
        yield client


def ask(client, **fields):
    return client.responses.create(**{"model": MODEL, "input": "hi", "temperature": 0, **fields})


def streamed(client, **fields):
    """All events, and the response that the client makes of them."""
    with client.responses.stream(**{"model": MODEL, "input": "hi", "temperature": 0, **fields}) as stream:
        events = list(stream)
        return events, stream.get_final_response()


def contents(response):
    """What the output says, without ids."""
    out = []
    for item in response.output:
        if item.type == "function_call":
            out.append((item.type, item.call_id, item.name, item.arguments))
        else:
            out.append((item.type, [part.text for part in item.content]))
    return out


def test_a_whole_response(client, engine):
    engine.say("the quick brown fox")
    response = ask(client, instructions="be brief", metadata={"k": "v"}, user="me")
    assert response.output_text == "the quick brown fox" and response.status == "completed"
    assert response.id.startswith("resp_") and response.object == "response" and response.model == MODEL
    assert response.metadata == {"k": "v"} and response.instructions == "be brief" and response.store
    assert (response.temperature, response.top_p, response.tool_choice, response.tools) == (0, 1, "auto", [])
    assert engine.prompt == "[system]be brief[user]hi[assistant]" and engine.seen[-1].key == ""
    used = response.usage
    assert used is not None and used.input_tokens == len(engine.seen[-1].prompt)
    assert used.output_tokens == len(engine.script) and used.total_tokens == used.input_tokens + used.output_tokens
    assert used.input_tokens_details.cached_tokens == used.input_tokens // 2
    assert used.output_tokens_details.reasoning_tokens == 0


def test_a_response_that_is_cut(client, engine):
    engine.say("the quick brown fox")
    response = ask(client, max_output_tokens=2)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete" and "the quick brown fox".startswith(response.output_text)
    *_, last = ask(client, max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete" and last.response.output[0].content == response.output[0].content


def test_events_come_in_order_and_make_the_whole(client, engine):
    engine.say("hmm</think>\n\n7 it is")
    engine.per_delta = 2
    whole = ask(client, extra_body=THINKING)
    assert contents(whole) == [("reasoning", ["hmm"]), ("message", ["\n\n7 it is"])]
    events, response = streamed(client, extra_body=THINKING)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert contents(response) == contents(whole) and response.usage == whole.usage
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "\n\n7 it is"
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "hmm"
    (text,) = [event for event in events if event.type == "response.output_text.done"]
    assert text.text == "\n\n7 it is" and text.item_id == response.output[1].id
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert [item.id.partition("_")[0] for item in response.output] == ["rs", "msg"]


def test_function_calls(client, engine):
    first, second = written_call("f", '{"a": 1}'), written_call("g", "{}")
    engine.say(f"hm</think>\nlook:\n{first}\n{second}")
    fields = {"tools": TOOLS, "extra_body": THINKING}
    whole = ask(client, **fields)
    kinds = [item.type for item in whole.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"] and whole.status == "completed"
    assert whole.output_text.strip() == "look:"
    assert [(call.name, call.arguments) for call in whole.output[2:]] == [("f", '{"a": 1}'), ("g", "{}")]
    assert len({call.call_id for call in whole.output[2:]}) == 2 and [tool.name for tool in whole.tools] == ["f", "g"]
    events, response = streamed(client, **fields)
    assert [item[0] for item in contents(response)] == kinds and response.output_text == whole.output_text
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta" and e.output_index == 2]
    assert "".join(event.delta for event in deltas) == '{"a": 1}' == deltas[-1].snapshot and len(deltas) > 1
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.output_index, event.arguments) for event in done] == [(2, '{"a": 1}'), (3, "{}")]
    assert len(ask(client, **fields, parallel_tool_calls=False).output) == 3
    without = ask(client, tools=TOOLS, tool_choice="none", extra_body=THINKING)
    assert [item.type for item in without.output] == ["reasoning", "message"]


def test_refusals_of_tools_name_the_routes_own_field(client):
    same = [TOOLS[0], TOOLS[0]]
    wrong = [TOOLS[1], {**TOOLS[0], "parameters": {"type": "array"}}]
    for fields, param in (
        ({"tools": same}, "tools"),
        ({"tools": wrong}, "tools[1].parameters"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "z"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ):
        with pytest.raises(openai.BadRequestError) as info:
            ask(client, **fields)
        assert info.value.param == param and param in info.value.message


AGENTS: dict = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Agents.",
    "tools": [{"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}}],
}


def test_functions_of_a_namespace(client, engine):
    """As Codex offers its own and those of MCP servers: it knows a call by both names alone."""
    engine.say(written_call("multi_agent_v1__spawn", '{"a": 1}') + "\n" + written_call("f", "{}"))
    tools = [TOOLS[0], AGENTS, {"type": "namespace", "name": "empty", "description": "", "tools": []}]
    whole = ask(client, tools=tools)
    assert "multi_agent_v1__spawn" in engine.prompt
    said = [(call.namespace, call.name, call.arguments) for call in whole.output]
    assert said == [("multi_agent_v1", "spawn", '{"a": 1}'), (None, "f", "{}")]
    assert [(tool.type, tool.name) for tool in whole.tools][1:] == [
        ("namespace", "multi_agent_v1"),
        ("namespace", "empty"),
    ]
    assert [one.name for one in whole.tools[1].tools] == ["spawn"]
    events = list(ask(client, tools=tools, stream=True))
    items = [
        event.item for event in events if event.type in ("response.output_item.added", "response.output_item.done")
    ]
    assert [(item.namespace, item.name) for item in items[:2]] == [("multi_agent_v1", "spawn")] * 2
    done = [event.to_dict() for event in events if event.type == "response.function_call_arguments.done"]
    assert [(one.get("namespace"), one["name"]) for one in done] == [one[:2] for one in said]
    assert [item.namespace for item in events[-1].response.output] == ["multi_agent_v1", None]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in whole.output]
    for before in ({"previous_response_id": whole.id}, {}):
        given = outputs if before else [{"role": "user", "content": "hi"}, *whole.output, *outputs]
        ask(client, input=given, tools=tools, tool_choice="none", **before)
        assert f'<{whole.output[0].call_id} multi_agent_v1__spawn {{"a": 1}}>' in engine.prompt


def test_a_function_of_a_namespace_can_be_forced(client, engine):
    engine.say(written_call("multi_agent_v1__spawn", "{}"))
    response = ask(client, tools=[TOOLS[0], AGENTS], tool_choice={"type": "function", "name": "spawn"})
    assert [call.namespace for call in response.output] == ["multi_agent_v1"]
    assert "multi_agent_v1__spawn" in engine.seen[-1].params.constraint.grammar
    wrong = {**AGENTS, "tools": [{**AGENTS["tools"][0], "parameters": {"type": "array"}}]}
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, tools=[TOOLS[0], wrong])
    assert info.value.param == "tools[1].tools[0].parameters"


def test_a_conversation_goes_on_from_what_is_kept(client, engine):
    engine.say(written_call("f", '{"a": 1}'))
    first = ask(client, input="what?", instructions="be brief", tools=TOOLS)
    (call,) = first.output
    engine.say("hm</think>it is 7")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    second = ask(client, input=[output], previous_response_id=first.id, extra_body=THINKING)
    asked = f'[user]what?[assistant]<{call.call_id} f {{"a": 1}}>[tool {call.call_id}]7[assistant]'
    assert engine.prompt == asked + "<think>"
    assert second.previous_response_id == first.id and second.output_text == "it is 7"
    _, third = streamed(client, input="sure?", previous_response_id=second.id)
    assert engine.prompt == asked + "(hm)it is 7[user]sure?[assistant]"
    ask(client, input="again", previous_response_id=third.id)
    assert engine.prompt.endswith("[user]sure?[assistant]hm</think>it is 7[user]again[assistant]")
    # The same by hand, without anything kept.
    ask(client, input=[{"role": "user", "content": "what?"}, *first.output, output], store=False)
    assert engine.prompt == asked


def test_tokens_are_counted_as_they_will_be_used(client, engine):
    engine.say("yes")
    first = ask(client)
    for fields in ({"input": "hi"}, {"input": "and?", "previous_response_id": first.id, "instructions": "be brief"}):
        counted = client.responses.input_tokens.count(model=MODEL, **fields)
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == ask(client, **fields).usage.input_tokens
    long = client.responses.input_tokens.count(model=MODEL, input="the quick brown fox " * 200)
    assert long.input_tokens > engine.max_model_len
    with pytest.raises(openai.BadRequestError) as info:
        client.responses.input_tokens.count(model=MODEL, input="x" * 100_000)
    assert info.value.param == "input"


def test_items_may_be_named_by_their_ids(client, engine):
    engine.say("it is 7")
    first = ask(client, input=[{"role": "user", "content": "what?"}])
    (asked,) = client.responses.input_items.list(first.id).data
    references = [{"type": "item_reference", "id": id_} for id_ in (asked.id, first.output[0].id)]
    ask(client, input=[*references, {"role": "user", "content": "sure?"}])
    assert engine.prompt == "[user]what?[assistant]it is 7[user]sure?[assistant]"
    for missing in ("msg_1", "msg_0_0", first.output[0].id + "0", "x"):
        with pytest.raises(openai.NotFoundError) as info:
            ask(client, input=[{"role": "user", "content": "x"}, {"type": "item_reference", "id": missing}])
        assert info.value.param == "input[1].id" and info.value.code == "item_not_found"


def test_what_is_kept_can_be_read_and_deleted(client, engine):
    engine.say("yes")
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    for response in (ask(client, input=items), streamed(client, input=items)[1]):
        assert client.responses.retrieve(response.id).to_dict() == {
            key: value for key, value in response.to_dict().items() if key != "parsed"
        } or contents(client.responses.retrieve(response.id)) == contents(response)
        listed = client.responses.input_items.list(response.id, limit=2)
        assert [item.content[0].text for item in listed.data] == ["4", "3"] and listed.has_more
        assert [item.content[0].text for item in listed] == ["4", "3", "2", "1", "0"]
        assert [
            i.content[0].text for i in client.responses.input_items.list(response.id, order="asc", limit=1)
        ] == list("01234")
        with pytest.raises(openai.BadRequestError, match="background"):
            client.responses.cancel(response.id)
        client.responses.delete(response.id)
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                call(response.id)


def test_what_is_not_kept(client, engine, url):
    engine.say("yes")
    response = ask(client, store=False)
    assert not response.store
    with pytest.raises(openai.NotFoundError) as info:
        ask(client, previous_response_id=response.id)
    assert info.value.code == "previous_response_not_found" and "bounded memory" in info.value.message
    kept = ask(client)
    with openai.OpenAI(base_url=url + "/v1", api_key="another", max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(kept.id)
        with pytest.raises(openai.NotFoundError):
            ask(other, previous_response_id=kept.id)
    large = ask(client, input="the quick brown fox jumps over the lazy dog. " * 25, metadata={"k": "v" * 500})
    assert client.responses.retrieve(large.id).id == large.id


def test_log_probabilities_are_those_of_the_text(client, engine):
    engine.say("hmm</think>7 it is")
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "extra_body": THINKING}
    whole = ask(client, **fields)
    logprobs = whole.output[1].content[0].logprobs
    assert "".join(one.token for one in logprobs) == "7 it is" and len(logprobs[0].top_logprobs) == 2
    events, _ = streamed(client, **fields)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [one.token for event in deltas for one in event.logprobs] == [one.token for one in logprobs]
    assert ask(client).output[0].content[0].logprobs == []


class Sum(BaseModel):
    total: int


def test_structured_text(client, engine):
    engine.say('{"total": 7}')
    parsed = client.responses.parse(model=MODEL, input="3 + 4?", text_format=Sum)
    assert parsed.output_parsed == Sum(total=7) and parsed.text.format.name == "Sum"
    constraint = engine.seen[-1].params.constraint
    assert constraint is not None and "total" in constraint.grammar
    ask(client, text={"format": {"type": "text"}})
    assert engine.seen[-1].params.constraint is None
    with client.responses.stream(model=MODEL, input="3 + 4?", text_format=Sum) as stream:
        assert stream.get_final_response().output_parsed == Sum(total=7)
    wrong = {"type": "json_schema", "name": "x", "schema": {"type": "object", "if": {"type": "nope"}}}
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, text={"format": wrong})
    assert info.value.param.startswith("text.format.schema")


def test_effort_turns_thinking_on_and_off(client, engine):
    engine.say("hm</think>7")
    for effort, end in (("high", "<think>"), ("none", "[assistant]"), (None, "[assistant]")):
        response = ask(client, reasoning={"effort": effort, "summary": "auto"})
        assert engine.prompt.endswith(end) and response.reasoning.effort == effort
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, reasoning={"effort": "some"})
    assert info.value.param == "reasoning.effort"


def test_thoughts_can_be_kept_by_the_client(client, engine):
    engine.say("hmm</think>7")
    first = ask(client, store=False, include=["reasoning.encrypted_content"], extra_body=THINKING)
    thought, message = first.output
    assert thought.encrypted_content
    sealed = {**thought.to_dict(), "content": None}
    ask(client, input=[sealed, message.to_dict(), {"role": "user", "content": "sure?"}], store=False)
    assert engine.prompt == "[assistant](hmm)7[user]sure?[assistant]"


def test_errors(client, engine):
    for fields, param in (
        ({"temperature": 3}, "temperature"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": "x " * 3000}, "input"),
        ({"max_output_tokens": 1_000_000}, "input"),
        ({"extra_body": {"background": True}}, "background"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
    ):
        with pytest.raises(openai.BadRequestError) as info:
            ask(client, **fields)
        assert info.value.param == param and param in info.value.message
    with pytest.raises(openai.NotFoundError) as info:
        ask(client, model="nope")
    assert info.value.code == "model_not_found"
    engine.fail_after = 3
    with pytest.raises(openai.InternalServerError, match="forward pass"):
        ask(client)
    *_, last = ask(client, stream=True)
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "server_error" and "forward pass" in last.response.error.message
    engine.fail_after, engine.unavailable = None, "no shard"
    with pytest.raises(openai.InternalServerError, match="no shard"):
        ask(client)
    engine.unavailable, engine.full = "", "256 are running"
    with pytest.raises(openai.RateLimitError):
        ask(client, stream=True)


@pytest.mark.parametrize("said", ["x " * 3000, "x" * 100_000], ids=["tokens", "characters"])
def test_a_stream_says_in_its_events_that_the_prompt_is_too_long(client, engine, url, said):
    """Codex shortens the conversation at this event alone; at a 400 its turn ends."""
    fields = {"instructions": "be brief", "metadata": {"k": "v"}, "top_p": 0.5, "store": True}
    events = list(ask(client, input=said, stream=True, **fields))
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert [event.sequence_number for event in events] == [0, 1, 2]
    response = events[-1].response
    assert response.status == "failed" and response.error.code == "context_length_exceeded"
    assert response.error.message.startswith("input: ") and "maximum context length" in response.error.message
    assert (response.instructions, response.metadata, response.temperature, response.top_p) == (
        "be brief",
        {"k": "v"},
        0,
        0.5,
    )
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    body = {"model": MODEL, "input": said, "stream": True}
    raw = httpx.post(url + "/v1/responses", json=body)
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.headers["x-request-id"]
    for path, other in (("responses", {"stream": False}), ("responses/input_tokens", {})):
        answer = httpx.post(f"{url}/v1/{path}", json={**body, **other})
        if answer.status_code != 200:  # tokens are counted however many they are
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert httpx.post(url + "/v1/responses", json={**body, "seed": "x"}).status_code == 400


def test_a_stream_that_waits_begins_in_order_even_where_it_fails(tokenizer):
    engine = Scripted(tokenizer)
    engine.fail_after, engine.delay_s = 0, 0.2
    with scripted_server(engine, AppSettings(first_event_s=0.02, silence_s=0.05)) as url:
        raw = httpx.post(url + "/v1/responses", json={"model": MODEL, "input": "hi", "stream": True})
        assert raw.status_code == 200 and raw.text.startswith(": waiting\n\n")
        with openai.OpenAI(base_url=url + "/v1", api_key="x") as client:
            kinds = [event.type for event in ask(client, stream=True)]
        assert kinds == ["response.created", "response.in_progress", "response.failed"]


def test_the_async_client(url, engine):
    engine.say("the quick brown fox")

    async def go():
        async with (
            openai.AsyncOpenAI(base_url=url + "/v1", api_key="x") as client,
            client.responses.stream(model=MODEL, input="hi") as stream,
        ):
            return (await stream.get_final_response()).output_text

    assert asyncio.run(go()) == "the quick brown fox"


def test_pages_and_queries_that_are_wrong(client, engine, url):
    engine.say("yes")
    kept = ask(client).id
    get = f"{url}/v1/responses/{kept}"
    headers = {"authorization": "Bearer mine"}
    assert httpx.get(get, headers=headers).json()["id"] == kept
    for query, param in (("order=up", "order"), ("limit=0", "limit"), ("limit=x", "limit"), ("after=x", "after")):
        answer = httpx.get(f"{get}/input_items?{query}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert httpx.get(f"{get}?stream=true", headers=headers).json()["error"]["param"] == "stream"
    assert httpx.get(f"{url}/v1/responses").status_code == 405
