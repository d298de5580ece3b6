"""Whatever stands in a body of /v1/responses or /v1/messages, it is prepared or refused by name, and never a fault of
ours."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
from scripted import MODEL, load_tokenizer

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.prepare import PromptLimits, Served
from isotherm.cluster.api.prepare_messages import count_tokens, prepare_messages
from isotherm.cluster.api.prepare_responses import count_input_tokens, prepare_responses
from isotherm.cluster.api.response_store import Kept, MemoryResponseStore
from isotherm.cluster.text.tool_formats.registry import chosen_format

pytestmark = pytest.mark.slow

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
RESPONSES = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "what?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "7"},
        {"type": "item_reference", "id": "msg_a_0"},
    ],
    "instructions": "be brief",
    "previous_response_id": "resp_a",
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": False}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "high", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"k": "v"},
    "temperature": 0.5,
    "max_output_tokens": 9,
    "seed": 3,
    "stop": ["x"],
    "chat_template_kwargs": {"x": 1},
    "stream": True,
}
MESSAGES = {
    "model": MODEL,
    "max_tokens": 9,
    "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "what?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "7", "is_error": False}]},
        {"role": "assistant", "content": "It is "},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "low"},
    "metadata": {"user_id": "me"},
    "stop_sequences": ["x"],
    "temperature": 0.5,
    "top_k": 5,
    "seed": 3,
    "chat_template_kwargs": {"x": 1},
}
VALUES = [
    None, True, 0, -1, 2**70, 0.5, "", "x", "auto", "text", "</think>", "\ud800", [], {}, [[]], [None], [5], {"a": {}},
    {"type": "text"}, {"type": "message"}, {"role": "user"}, [{"type": "text", "text": "x"}], {"$ref": "#"},
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tokenizer = load_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    limits = PromptLimits(2000, tokenizer.vocab_size, 32_000)
    yield Served((MODEL,), tokenizer, limits, tool_format=chosen_format("hermes", None))
    tokenizer.chat_template.close()


def places(value, path=()):
    """Every place in a body, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def mutated(body, draw: random.Random):
    body = json.loads(json.dumps(body))
    for _ in range(draw.randint(1, 3)):
        *path, last = draw.choice(list(places(body)))
        at = body
        for key in path:
            at = at[key]
        others = list(places(body))
        what = draw.random()
        if what < 0.2:
            del at[last]
        elif what < 0.4:  # something of the body itself, in the wrong place
            found = body
            for key in draw.choice(others):
                found = found[key]
            at[last] = json.loads(json.dumps(found))
        else:
            at[last] = draw.choice(VALUES)
        if not body:
            break
    return body


def response_store():
    store = MemoryResponseStore(1 << 20)
    message = {"type": "message", "id": "msg_a_0", "role": "assistant", "status": "completed"}
    output = [{**message, "content": [{"type": "output_text", "text": "yes", "annotations": []}]}]
    asked = {"type": "message", "id": "msg_a_in0", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    store.put("me", Kept.of({"id": "resp_a", "previous_response_id": None, "output": output}, [asked]))
    return store


@pytest.mark.parametrize("route", ["responses", "messages"])
def test_no_body_is_a_fault_of_ours(served, route):
    body = RESPONSES if route == "responses" else MESSAGES
    if route == "responses":
        store = response_store()
        prepare, count = partial(prepare_responses, store, "me"), partial(count_input_tokens, store, "me")
    else:
        prepare, count = prepare_messages, count_tokens
    asked = json.dumps(body).encode()
    assert len(prepare(asked, "id_1", served).requests[0].prompt) == count(asked, served) > 20
    draw, refused = random.Random(5), 0
    for _ in range(400):
        raw = json.dumps(mutated(body, draw)).encode()
        try:
            prepared = prepare(raw, "id_1", served)
            assert len(prepared.requests[0].prompt) == count(raw, served)
            prepared.new_reply(1, None)
        except ReplyError as error:
            assert 400 <= error.status < 500 and error.param, (raw, error.message)
            assert error.param.partition("[")[0].rpartition(".")[2] in error.message or error.status == 404
            refused += 1
    assert 100 < refused < 390
