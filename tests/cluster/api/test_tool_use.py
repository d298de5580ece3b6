"""Tool calls through the HTTP application: what the model says, token by token, and what the client reads."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer
from tool_texts import CITY, NOW, WEATHER, coder, dsml, glm, hermes, kimi, v3, v31

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tool_formats.registry import TOOL_FORMATS

TINY = Tokenizer.load(bundled_model())
EOS = min(TINY.eos_token_ids)
TOOLS = [
    {"type": "function", "function": {"name": tool.name, "description": "d", "parameters": tool.parameters}}
    for tool in (WEATHER, NOW)
]
USER = [{"role": "user", "content": "What is the weather?"}]
TWO = {
    "deepseek_v3": v3(("get_weather", CITY), ("now", "{}")),
    "deepseek_v3.1": v31(("get_weather", CITY), ("now", "{}")),
    "deepseek_v3.2": dsml(("get_weather", (("city", "true", "Rome"),)), ("now", ())),
    "kimi_k2": kimi(("functions.get_weather:0", CITY), ("functions.now:1", "{}")),
    "glm4": glm("get_weather", ("city", "Rome")) + "\n" + glm("now"),
    "qwen3_coder": coder("get_weather", ("city", "Rome")) + "\n" + coder("now"),
    "hermes": hermes(("get_weather", CITY), ("now", "{}")),
}


@pytest.fixture(scope="module")
def served():
    """(engine, client by the tool_format): the engine says what its script holds."""
    engine = FakeEngine(TINY.vocab_size, max_model_len=4096)
    servers = {}

    def client(tool_format="auto"):
        if tool_format not in servers:
            app = build_app(engine, TINY, "tiny", settings=AppSettings(tool_format=tool_format))
            manager = http_server(app)
            servers[tool_format] = manager, openai.OpenAI(base_url=f"{manager.__enter__()}/v1", api_key="-")
        return servers[tool_format][1]

    yield engine, client
    for manager, of_it in servers.values():
        of_it.close()
        manager.__exit__(None, None, None)
    TINY.chat_template.close()


def says(engine, text, *, per_delta=1, end=True):
    engine.script = TINY.encode(text, add_special_tokens=False) + ([EOS] if end else [])
    engine.per_delta = per_delta


def ask(client, **fields):
    return client.chat.completions.create(model="tiny", messages=USER, **{"tools": TOOLS, **fields})


def whole(reply, choice=0):
    """(content, [(id, name, arguments)], finish reason) of a reply."""
    of_it = reply.choices[choice]
    calls = [(call.id, call.function.name, call.function.arguments) for call in of_it.message.tool_calls or ()]
    return of_it.message.content, calls, of_it.finish_reason


def streamed(chunks):
    """The same of each choice of a stream, put together as clients do, which is checked on the way."""
    contents, calls, reasons = {}, {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the last"
            if choice.delta.content:
                contents[choice.index] = contents.get(choice.index, "") + choice.delta.content
            for piece in choice.delta.tool_calls or ():
                of_choice = calls.setdefault(choice.index, [])
                if piece.index == len(of_choice):
                    assert piece.id and piece.type == "function" and piece.function.arguments == ""
                    of_choice.append([piece.id, piece.function.name, ""])
                else:
                    assert piece.id is piece.type is piece.function.name is None and piece.function.arguments
                    of_choice[piece.index][2] += piece.function.arguments
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    return [
        (contents.get(index), [tuple(call) for call in calls.get(index, ())], reasons[index])
        for index in sorted(reasons)
    ]


@pytest.mark.parametrize("form", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("per_delta", [1, 3, 1000])
def test_calls_of_every_format(served, form, per_delta):
    engine, client = served
    says(engine, "Let me see." + TWO[form], per_delta=per_delta)
    content, calls, reason = whole(ask(client(form)))
    assert (content, [call[1:] for call in calls]) == ("Let me see.", [("get_weather", CITY), ("now", "{}")])
    assert reason == "tool_calls"
    (chunked,) = streamed(ask(client(form), stream=True))
    assert (chunked[0], [call[1:] for call in chunked[1]], chunked[2]) == (
        content,
        [call[1:] for call in calls],
        reason,
    )
    ids = [call[0] for call in calls + chunked[1]]
    own = ["functions.get_weather:0", "functions.now:1"] * 2
    assert ids == own if form == "kimi_k2" else len(set(ids)) == 4 and all(id_.startswith("call_") for id_ in ids)


def test_the_templates_own_format_is_taken(served):
    engine, client = served
    says(engine, TWO["deepseek_v3.1"])
    content, calls, _ = whole(ask(client()))
    assert content is None and len(calls) == 2
    assert "### get_weather" in TINY.decode(engine.seen[-1].prompt)


def test_each_choice_has_its_calls_and_ids(served):
    engine, client = served
    says(engine, "So: " + TWO["deepseek_v3.1"])
    choices = [whole(ask(client(), n=3), i) for i in range(3)]
    ids = {call[0] for _, calls, _ in choices for call in calls}
    assert len(ids) == 6 and all(reason == "tool_calls" for _, _, reason in choices)
    chunked = streamed(ask(client(), n=3, stream=True))
    assert [(c, [call[1:] for call in calls], r) for c, calls, r in chunked] == [
        (c, [call[1:] for call in calls], r) for c, calls, r in choices
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_alone_ends_the_choice(served, stream):
    engine, client = served
    says(engine, TWO["deepseek_v3.1"])
    closed = engine.closed_early
    fields = {"parallel_tool_calls": False, "stream": stream}
    reply = ask(client(), **fields, **({"stream_options": {"include_usage": True}} if stream else {}))
    if stream:
        chunks = list(reply)
        ((content, calls, reason),) = streamed(chunks)
        used = chunks[-1].usage
    else:
        content, calls, reason = whole(reply)
        used = reply.usage
    assert (content, [call[1:] for call in calls], reason) == (None, [("get_weather", CITY)], "tool_calls")
    first = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + CITY
    assert used.completion_tokens == len(TINY.encode(first, add_special_tokens=False))
    assert engine.closed_early == closed + 1


def test_with_none_the_model_is_told_of_tools_and_calls_none(served):
    engine, client = served
    says(engine, "Hm." + TWO["deepseek_v3.1"])
    content, calls, reason = whole(ask(client(), tool_choice="none"))
    assert not calls and reason == "stop"
    assert content == "Hm." + TWO["deepseek_v3.1"]
    assert "### get_weather" in TINY.decode(engine.seen[-1].prompt)


def test_without_tools_all_is_text(served):
    engine, client = served
    says(engine, "Hm." + TWO["deepseek_v3.1"])
    assert whole(ask(client(), tools=openai.NOT_GIVEN))[:2] == ("Hm." + TWO["deepseek_v3.1"], [])


def test_a_thought_may_speak_of_calls(served):
    engine, client = served
    thought = f"I could {v31(('now', '{}'))} do."
    says(engine, f"{thought}</think>{v31(('get_weather', CITY))}")
    extra = {"chat_template_kwargs": {"thinking": True}}
    reply = ask(client(), extra_body=extra)
    content, calls, reason = whole(reply)
    assert (content, [call[1:] for call in calls], reason) == (None, [("get_weather", CITY)], "tool_calls")
    assert reply.choices[0].message.reasoning_content == thought
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    ((_, chunked, _),) = streamed(ask(client(), extra_body=extra, stream=True))
    assert [call[1:] for call in chunked] == [("get_weather", CITY)]


def test_a_call_that_is_cut_short_has_what_there_is_of_it(served):
    engine, client = served
    text = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Ro'
    says(engine, text)
    tokens = len(engine.script) - 1
    for reply in (whole(ask(client(), max_tokens=tokens)), *streamed(ask(client(), max_tokens=tokens, stream=True))):
        content, calls, reason = reply
        assert (content, [call[1:] for call in calls], reason) == (None, [("get_weather", '{"city": "Ro')], "length")


def test_the_finish_reason_is_not_tool_calls_where_there_are_none(served):
    engine, client = served
    for text in ("No call.", "<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜>"):
        says(engine, text)
        content, calls, reason = whole(ask(client()))
        assert content and not calls and reason == "stop"


def test_logprobs_and_stops_beside_calls(served):
    engine, client = served
    says(engine, "Let me see." + v31(("get_weather", '{"city": "Rome STOP"}')))
    reply = ask(client(), logprobs=True, stop=["STOP"])
    content, calls, _ = whole(reply)
    assert (content, [call[1:] for call in calls]) == ("Let me see.", [("get_weather", '{"city": "Rome ')])
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    chunks = list(ask(client(), logprobs=True, stop=["STOP"], stream=True))
    chunked = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    assert [entry.token for entry in chunked] == [entry.token for entry in entries]


def test_a_stream_of_a_call_begins_before_its_end(served):
    engine, client = served
    says(engine, v31(("get_weather", '{"city": "' + "Rome and " * 50 + '"}')))
    pieces = [
        piece
        for chunk in ask(client(), stream=True)
        for choice in chunk.choices
        for piece in choice.delta.tool_calls or ()
    ]
    assert len(pieces) > 50


def refused(client, **fields):
    with pytest.raises(openai.BadRequestError) as info:
        ask(client, **fields)
    return info.value.body["param"], info.value.body["message"]


def test_markers_that_are_special_tokens_are_seen_and_not_shown(served, tmp_path):
    """As some vocabularies have them: left out of text, they still make calls."""
    source = bundled_model()
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    for token in vocabulary["added_tokens"]:
        token["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text((source / name).read_text())
    tokenizer = Tokenizer.load(tmp_path)
    engine, _ = served
    with http_server(build_app(engine, tokenizer, "tiny")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
        says(engine, f"Let me see.{TWO['deepseek_v3.1']}<｜tool▁sep｜> Done.")
        for content, calls, reason in (whole(ask(client)), *streamed(ask(client, stream=True))):
            assert [call[1:] for call in calls] == [("get_weather", CITY), ("now", "{}")]
            assert (content, reason) == ("Let me see. Done.", "tool_calls")
        assert whole(ask(client, tool_choice="none"))[0] == 'Let me see.get_weather{"city": "Rome"}now{} Done.'
        client.close()
    tokenizer.chat_template.close()


def test_other_routes_have_the_same_calls(served):
    engine, client = served
    says(engine, "Let me see." + TWO["deepseek_v3.1"])
    functions = [tool["function"] for tool in TOOLS]
    base = str(client().base_url).rstrip("/")
    messages = httpx.post(
        f"{base}/messages",
        json={
            "model": "tiny",
            "max_tokens": 500,
            "messages": USER,
            "tools": [{"name": f["name"], "input_schema": f["parameters"]} for f in functions],
        },
    ).json()
    used = [(block["name"], block["input"]) for block in messages["content"] if block["type"] == "tool_use"]
    assert used == [("get_weather", json.loads(CITY)), ("now", {})] and messages["stop_reason"] == "tool_use"
    response = client().responses.create(
        model="tiny", input="What is the weather?", tools=[{"type": "function", **f} for f in functions]
    )
    called = [(item.name, item.arguments) for item in response.output if item.type == "function_call"]
    assert called == [("get_weather", CITY), ("now", "{}")]


def test_tools_that_cannot_be_called_are_refused_by_name(served, tmp_path):
    engine, client = served
    param, message = refused(client("none"))
    assert param == "tools" and "tool_format" in message
    ask(client("none"), tool_choice="none", max_tokens=2)  # telling of them is no call
    param, message = refused(client(), tool_choice={"type": "function", "function": {"name": "fly"}})
    assert param == "tool_choice" and "fly" in message
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))  # whose template shows tools, and no call
    with http_server(build_app(engine, tokenizer, "tiny")) as url:
        param, message = refused(openai.OpenAI(base_url=f"{url}/v1", api_key="-"))
        assert param == "tools" and "template" in message
    tokenizer.chat_template.close()


STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
CITY_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ANSWER = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY_SCHEMA}}


def constraint(engine, client, **fields):
    """What the engine is told to hold the output to."""
    ask(client, max_tokens=1, **fields)
    return engine.seen[-1].params.constraint


def held(grammar, text):
    ids = TINY.encode(text, add_special_tokens=False)
    matcher = TINY.grammar_vocabulary(TINY.vocab_size).compiled(grammar).copy()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_what_must_be_called_is_held_to_it(served):
    engine, client = served
    says(engine, "No.")
    rome, now = v31(("get_weather", CITY)), v31(("now", "{}"))
    assert constraint(engine, client()) is None and constraint(engine, client(), tool_choice="none") is None
    required = constraint(engine, client(), tool_choice="required")
    assert required.after == () and held(required.grammar, rome) and held(required.grammar, TWO["deepseek_v3.1"])
    named = constraint(engine, client(), tool_choice={"type": "function", "function": {"name": "now"}})
    assert held(named.grammar, now) and not held(named.grammar, rome) and not held(named.grammar, "text")
    single = constraint(engine, client(), tool_choice="required", parallel_tool_calls=False)
    assert held(single.grammar, rome) and not held(single.grammar, TWO["deepseek_v3.1"])
    strict = constraint(engine, client(), tools=STRICT)
    assert held(strict.grammar, "It is sunny.") and held(strict.grammar, "So: " + rome)
    assert not held(strict.grammar, v31(("get_weather", "{}")))
    thinking = {"chat_template_kwargs": {"thinking": True}}
    thought = constraint(engine, client(), tool_choice="required", extra_body=thinking)
    assert thought.after == (TINY.token_id("</think>"),) and thought.grammar == required.grammar


def test_an_answer_by_a_schema_or_calls(served):
    engine, client = served
    says(engine, "No.")
    rome = v31(("get_weather", CITY))
    either = constraint(engine, client(), response_format=ANSWER).grammar
    assert held(either, CITY) and held(either, rome) and not held(either, "text") and not held(either, CITY + rome)
    calls = constraint(engine, client(), response_format=ANSWER, tool_choice="required").grammar
    assert held(calls, rome) and not held(calls, CITY)
    answer = constraint(engine, client(), response_format=ANSWER, tool_choice="none").grammar
    assert held(answer, CITY) and not held(answer, rome)


def test_a_strict_tool_that_cannot_be_enforced_is_refused_by_name(served):
    engine, client = served
    odd = {"type": "object", "properties": {"a": {"type": "object", "not": {}}}}
    tools = [TOOLS[1], {"type": "function", "function": {"name": "odd", "parameters": odd, "strict": True}}]
    reached = len(engine.seen)
    param, message = refused(client(), tools=tools, tool_choice="required")
    assert param == "tools[1].function.parameters" and "'not'" in message
    assert len(engine.seen) == reached
    endless = {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}
    tools[1]["function"]["parameters"] = endless
    param, _ = refused(client(), tools=tools, tool_choice="required")
    assert param == "tools[1].function.parameters"


def test_a_chat_of_calls_alone_has_no_content(served):
    engine, client = served
    says(engine, v31(("get_weather", CITY)))
    chunks = list(
        client().chat.completions.create(model="tiny", messages=USER, tools=TOOLS, tool_choice="required", stream=True)
    )
    assert [c.choices[0].delta.content for c in chunks if c.choices[0].delta.role] == [None]
    assert not [c for c in chunks if c.choices[0].delta.content]


def test_what_was_called_goes_back_into_the_prompt(served):
    engine, client = served
    says(engine, v31(("get_weather", CITY)))
    message = ask(client()).choices[0].message
    chat = [*USER, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    says(engine, "It is sunny.")
    reply = client().chat.completions.create(model="tiny", messages=chat, tools=TOOLS)
    assert reply.choices[0].message.content == "It is sunny."
    prompt = TINY.decode(engine.seen[-1].prompt, skip_special_tokens=False)
    assert f"{v31(('get_weather', CITY))}<｜end▁of▁sentence｜>" in prompt
    assert json.loads(CITY)["city"] in prompt and "sunny" in prompt
