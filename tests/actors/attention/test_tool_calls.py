"""Required calls by the bundled model at temperature 1: whatever it writes parses, and fits the schema of its tool."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from grammars import outputs, tiny_engine, tiny_tokenizer
from tool_schemas import random_tools

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import PromptLimits, Served
from isotherm.cluster.api.prepare_chat import prepare_chat_body
from isotherm.cluster.messages.requests import FinishReason
from isotherm.cluster.text.output import joined
from isotherm.cluster.text.tool_formats.registry import TOOL_FORMATS

pytestmark = pytest.mark.slow

CASES = 50
LEAST = {"deepseek_v3.2": 20}  # 22 end on each instruction set; of GLM's form 30 to 32, of the others 39 to 49
LENGTH = 2048


def body(tools, **fields):
    functions = [{"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}} for tool in tools]
    asked = {"model": "m", "messages": [{"role": "user", "content": "Please do it."}], "tools": functions, **fields}
    return parse_body(ChatBody, json.dumps(asked).encode())


def served_as(form):
    tokenizer = tiny_tokenizer()
    limits = PromptLimits(LENGTH, tokenizer.vocab_size, 1 << 20)
    return Served(["m"], tokenizer, limits, tool_format=TOOL_FORMATS[form])


def said(prepared, output):
    """The fields of a whole output."""
    parser = prepared.new_parser(0)
    text = tiny_tokenizer().decode(output.tokens[:-1], skip_special_tokens=False)
    return joined([parser.feed(text), parser.finish()])


def test_the_bundled_model_calls_what_it_is_offered():
    """By itself, as it was trained to, and strict or not."""
    weather = {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    }
    engine = tiny_engine(LENGTH)
    for strict in (False, True):
        asked = {
            "model": "m",
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "tools": [{"type": "function", "function": {**weather, "strict": strict}}],
            "temperature": 0,
        }
        prepared = prepare_chat_body(parse_body(ChatBody, json.dumps(asked).encode()), "r", served_as("deepseek_v3.1"))
        (call,) = said(prepared, outputs(engine, *prepared.requests)["r-0"]).tool_calls
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize("form", sorted(TOOL_FORMATS))
def test_every_finished_call_fits(form):
    """The model was trained on the form of V3.1 alone, and is held to the others all the same."""
    engine, served = tiny_engine(LENGTH), served_as(form)
    r = random.Random(f"calls {form}")
    prepared = []
    for i in range(CASES):
        tools = random_tools(r)
        named = {"type": "function", "function": {"name": tools[0].name}}
        choice = r.choice(["required", "required", named])
        asked = body(tools, tool_choice=choice, temperature=1, seed=i, max_tokens=300, parallel_tool_calls=i % 2 == 0)
        prepared.append((tools, choice, prepare_chat_body(asked, f"r{i}", served)))
    given = outputs(engine, *(one.requests[0] for _, _, one in prepared))
    finished = 0
    for tools, choice, one in prepared:
        output = given[one.requests[0].id]
        assert not output.error
        if output.reason is not FinishReason.STOP:
            continue
        finished += 1
        fields = said(one, output)
        assert fields.tool_calls and not fields.content
        schemas = {tool.name: tool.parameters for tool in tools}
        for call in fields.tool_calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
            assert choice == "required" or call.name == tools[0].name
    assert finished >= LEAST.get(form, CASES // 2), f"{finished} of {CASES}"
