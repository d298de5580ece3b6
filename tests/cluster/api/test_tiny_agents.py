"""The bundled model as agents meet it: a tool is called, its result goes back, through /v1/responses and /v1/messages
and their unmodified clients; whole and streamed are the same tokens."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from fake_engine import http_server
from local_client import TINY, LocalClient

from isotherm.cluster.api.app import build_app
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ASKED = "What is 3 + 4? Use the tool."


@pytest.fixture(scope="module")
def url():
    tokenizer = Tokenizer.load(TINY)
    with http_server(build_app(LocalClient(max_model_len=1024), tokenizer, "tiny")) as url:
        yield url
    tokenizer.chat_template.close()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
def test_responses_call_a_tool_and_go_on(url, choice):
    tools: list = [{"type": "function", "name": "add", "description": "Adds.", "parameters": ADD, "strict": True}]
    with openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        fields: dict = {"model": "tiny", "tools": tools, "extra_body": {"seed": 7}}
        first = client.responses.create(input=ASKED, tool_choice=choice, **fields)
        with client.responses.stream(input=ASKED, tool_choice=choice, **fields) as stream:
            streamed = stream.get_final_response()
        calls = [[(item.name, item.arguments) for item in one.output] for one in (first, streamed)]
        assert calls[0] == calls[1] and first.usage.output_tokens == streamed.usage.output_tokens
        (call, *_) = first.output
        assert call.type == "function_call" and call.name == "add" and json.loads(call.arguments).keys() == {"a", "b"}
        results = [{"type": "function_call_output", "call_id": item.call_id, "output": "7"} for item in first.output]
        second = client.responses.create(
            input=results, previous_response_id=first.id, max_output_tokens=40, tool_choice="none", **fields
        )
        by_hand = client.responses.create(
            input=[{"role": "user", "content": ASKED}, *first.output, *results],
            max_output_tokens=40,
            tool_choice="none",
            **fields,
        )
        assert second.output_text == by_hand.output_text != ""
        assert second.usage.input_tokens == by_hand.usage.input_tokens > first.usage.input_tokens
        assert by_hand.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
def test_messages_use_a_tool_and_go_on(url, choice):
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        tools: list = [{"name": "add", "description": "Adds.", "input_schema": ADD, "strict": True}]
        fields: dict = {"model": "tiny", "tools": tools, "max_tokens": 200, "extra_body": {"seed": 7}}
        turns: list = [{"role": "user", "content": ASKED}]
        first = client.messages.create(messages=turns, tool_choice=choice, **fields)
        with client.messages.stream(messages=turns, tool_choice=choice, **fields) as stream:
            streamed = stream.get_final_message()
        used = [[(block.name, block.input) for block in one.content] for one in (first, streamed)]
        assert used[0] == used[1] and first.stop_reason == streamed.stop_reason == "tool_use"
        assert first.content[0].name == "add" and first.content[0].input.keys() == {"a", "b"}
        counted = client.messages.count_tokens(model="tiny", messages=turns, tools=tools)
        assert counted.input_tokens == first.usage.input_tokens + first.usage.cache_read_input_tokens
        results = [{"type": "tool_result", "tool_use_id": block.id, "content": "7"} for block in first.content]
        turns += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        fields["max_tokens"] = 40
        second = client.messages.create(messages=turns, tool_choice={"type": "none"}, **fields)
        assert second.content[0].type == "text" and second.stop_reason in ("end_turn", "max_tokens")


def test_both_routes_and_a_chat_say_the_same(url):
    turns: list = [{"role": "user", "content": "Tell me a story."}]
    with (
        openai.OpenAI(base_url=url + "/v1", api_key="x") as client,
        anthropic.Anthropic(base_url=url, api_key="x") as other,
    ):
        chat = client.chat.completions.create(model="tiny", messages=turns, seed=3, max_tokens=60)
        response = client.responses.create(model="tiny", input=turns, max_output_tokens=60, extra_body={"seed": 3})
        message = other.messages.create(model="tiny", messages=turns, max_tokens=60, extra_body={"seed": 3})
        said = chat.choices[0].message.content
        assert said and response.output_text == message.content[0].text == said
        assert chat.usage.prompt_tokens == response.usage.input_tokens
        used = message.usage
        assert used.input_tokens + used.cache_read_input_tokens == chat.usage.prompt_tokens
        assert used.output_tokens == chat.usage.completion_tokens == response.usage.output_tokens


TOOLS = {
    "add": ADD,
    "calculator": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression"}},
        "required": ["expression"],
    },
    "get_current_weather": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location"],
    },
}
WORDS = {
    "add": "Add two numbers.",
    "calculator": "Evaluate an arithmetic expression.",
    "get_current_weather": "Get the current weather in a given location",
}


@pytest.mark.parametrize(
    ("name", "question", "arguments"),
    [
        ("add", "Use add to compute 3 + 4.", {"a": 3, "b": 4}),
        ("add", "What is 2 + 2?", {"a": 2, "b": 2}),
        ("add", "Add 17 and 25.", {"a": 17, "b": 25}),
        ("calculator", "What is 12 * 7?", {"expression": "12 * 7"}),
        ("calculator", "Use the calculator to answer: What is 25 + 17?", {"expression": "25 + 17"}),
        ("get_current_weather", "What is the weather in Paris?", {"location": "Paris"}),
        ("get_current_weather", "What's the weather like in Tokyo?", {"location": "Tokyo"}),
        ("get_current_weather", "What is the weather in Oslo in celsius?", {"location": "Oslo", "unit": "celsius"}),
    ],
)
def test_a_tool_that_fits_the_question_is_called_unasked(url, name, question, arguments):
    """As the examples of most agents have it: `tool_choice` is "auto"."""
    function = {"name": name, "description": WORDS[name], "parameters": TOOLS[name]}
    with openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            tools=[{"type": "function", "function": function}],
            temperature=0,
        )
        (call,) = reply.choices[0].message.tool_calls or [None]
        assert call is not None, reply.choices[0].message.content
        assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)
        assert reply.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("sum_", [7, 42])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("separators", [(",", ":"), (",", ": ")])
def test_what_a_tool_said_is_read_as_programs_send_it(url, sum_, separators, indent):
    a, b = sum_ // 2, sum_ - sum_ // 2
    call = {"id": "call_0", "type": "function"}
    call["function"] = {"name": "add", "arguments": json.dumps({"a": a, "b": b})}
    said = json.dumps({"result": sum_}, separators=separators, indent=indent)
    turns: list = [
        {"role": "user", "content": f"Use add to compute {a} + {b}."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": said},
    ]
    tool: dict = {"name": "add", "description": WORDS["add"], "parameters": ADD}
    with openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        reply = client.chat.completions.create(
            model="tiny", messages=turns, tools=[{"type": "function", "function": tool}], temperature=0
        )
    assert reply.choices[0].message.content == f"{a} + {b} = {sum_}."
