"""Every pair of what a chat may ask for, and 200 random larger sets, with the `openai` client, unmodified: each works,
keeps what each part promises, and comes to the same streamed and whole."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "forecast", "description": "The weather.", "parameters": PARAMETERS}}
ANSWER = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
USER = {"role": "user", "content": "What is 3 + 4?"}
STOP = "o"
FEATURES: dict[str, dict[str, Any]] = {
    "n": {"n": 3},
    "stop": {"stop": [STOP]},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "schema": {"response_format": ANSWER},
    "tools": {"tools": [TOOL], "tool_choice": "required"},
    "thinking": {"extra_body": {"chat_template_kwargs": {"thinking": True}}},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    "prefix": {"messages": [USER, {"role": "assistant", "content": "The answer ", "prefix": True}]},
}
# Two that one request cannot mean at once: an answer of one shape and a call; a thought, or a call, where an answer has
# been begun.
NO_SENSE = [{"tools", "prefix"}, {"thinking", "prefix"}]


def combinations() -> list[tuple[str, ...]]:
    draw = random.Random(11)
    names = list(FEATURES)
    larger = [tuple(sorted(draw.sample(names, draw.randint(3, len(names))))) for _ in range(200)]
    every = [*itertools.combinations(names, 1), *itertools.combinations(names, 2), *larger]
    return [c for c in dict.fromkeys(every) if not any(pair <= set(c) for pair in NO_SENSE)]


def body(features: tuple[str, ...], seed: int) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 120, "temperature": 1, "seed": seed}
    for feature in features:
        asked |= FEATURES[feature]
    return asked


def streamed(client: openai.OpenAI, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices that the chunks amount to, in the form of `whole`."""
    choices: dict[int, dict[str, Any]] = {}
    used = None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**asked, **options):
        used = chunk.usage or used
        for choice in chunk.choices:
            mine = choices.setdefault(
                choice.index, {"content": "", "reasoning": "", "calls": {}, "tokens": [], "finish": None}
            )
            mine["content"] += choice.delta.content or ""
            mine["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                known = mine["calls"].setdefault(call.index, {"name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
            if choice.logprobs is not None:
                mine["tokens"] += [entry.token for entry in choice.logprobs.content or ()]
            mine["finish"] = choice.finish_reason or mine["finish"]
    assert used is not None
    out = [choices[index] for index in sorted(choices)]
    for choice in out:
        choice["calls"] = [choice["calls"][index] for index in sorted(choice["calls"])]
    return [{"usage": used.completion_tokens}, *out]


def whole(client: openai.OpenAI, asked: dict[str, Any]) -> list[dict[str, Any]]:
    reply = client.chat.completions.create(**asked)
    out = []
    for choice in reply.choices:
        calls = [
            {"name": call.function.name, "arguments": call.function.arguments}
            for call in choice.message.tool_calls or ()
        ]
        out.append(
            {
                "content": choice.message.content or "",
                "reasoning": getattr(choice.message, "reasoning_content", None) or "",
                "calls": calls,
                "tokens": [entry.token for entry in choice.logprobs.content] if choice.logprobs else [],
                "finish": choice.finish_reason,
            }
        )
    assert reply.usage is not None
    return [{"usage": reply.usage.completion_tokens}, *out]


def check(features: tuple[str, ...], used: dict[str, Any], choices: list[dict[str, Any]]) -> None:
    """What each feature promises of a reply, whatever else was asked for."""
    assert len(choices) == (3 if "n" in features else 1)
    for choice in choices:
        assert choice["finish"] in ("stop", "length", "tool_calls")
        text = choice["content"]
        if "stop" in features:
            assert STOP not in text
        if "thinking" not in features:
            assert choice["reasoning"] == ""
        complete = choice["finish"] != "length" and "stop" not in features
        if "tools" in features and complete:
            assert choice["finish"] == "tool_calls" and choice["calls"]
            for call in choice["calls"]:
                assert call["name"] == "forecast"
                Draft202012Validator(PARAMETERS).validate(json.loads(call["arguments"]))
        elif "schema" in features and complete:
            Draft202012Validator(SCHEMA).validate(json.loads(text))
    if "logprobs" in features:
        assert used["usage"] >= sum(len(choice["tokens"]) for choice in choices) > 0
    else:
        assert not any(choice["tokens"] for choice in choices)


@pytest.mark.parametrize("features", combinations(), ids="+".join)
def test_features_go_together(client, features):
    seed = len(features) * 7919 + sum(map(ord, "".join(features)))
    asked = body(features, seed)
    used, *choices = whole(client, asked)
    check(features, used, choices)
    assert streamed(client, asked) == [used, *choices]
    if "n" in features:  # more choices leave the first as it is
        (_, alone) = whole(client, asked | {"n": 1})
        assert alone == choices[0]
