"""Bodies that are nearly right: valid ones of every route with something in them changed, as text or as bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "naïve 😀"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
        {"role": "user", "content": "and?", "name": "ann"},
    ],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "max_completion_tokens": 5,
    "n": 2,
    "seed": 7,
    "stop": ["x", "\n\n"],
    "stop_token_ids": [3],
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_timings": True},
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": -3.5},
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "priority": 3,
    "user": "u",
    "chat_template_kwargs": {"thinking": True},
    "separate_reasoning": True,
    "metadata": {"a": "b"},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = {
    "model": "m",
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "user", "content": "again"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "adds",
                "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            },
        }
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "max_tokens": 4,
    "reasoning_effort": "low",
    "stream": True,
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3}, "b": {"enum": ["x", None]}, "c": {"$ref": "#/$defs/c"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"c": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1}},
}
STRUCTURED = {
    "model": "m",
    "messages": [{"role": "user", "content": "json"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}},
    "max_tokens": 4,
}
COMPLETION = {
    "model": "m",
    "prompt": ["hello", "日本"],
    "max_tokens": 4,
    "temperature": 1,
    "echo": True,
    "n": 2,
    "best_of": 2,
    "stop": "x",
    "stream": False,
    "logit_bias": {"1": 1},
    "skip_special_tokens": False,
    "ignore_eos": True,
}
RESPONSE = {
    "model": "m",
    "instructions": "be short",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "add"}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"role": "user", "content": "again"},
    ],
    "tools": [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}],
    "tool_choice": "auto",
    "text": {"format": {"type": "text"}},
    "reasoning": {"summary": "auto"},
    "max_output_tokens": 4,
    "temperature": 0.5,
    "store": True,
    "metadata": {"a": "b"},
    "stream": True,
    "seed": 5,
}
MESSAGES = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "be short", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": "again"},
    ],
    "tools": [{"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {"a": {}}}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "stop_sequences": ["x"],
    "temperature": 0.5,
    "top_k": 3,
    "metadata": {"user_id": "u"},
    "stream": True,
}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", TOOLS),
    ("/v1/chat/completions", STRUCTURED),
    ("/v1/completions", {"model": "m", "prompt": "x", "guided_regex": "a+b?", "max_tokens": 3}),
    ("/v1/completions", {"model": "m", "prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {"model": "m", "prompt": [[5, 6], [7]], "logprobs": 3, "stream": True}),
    ("/v1/responses", RESPONSE),
    ("/v1/responses", {"model": "m", "input": "hi", "max_output_tokens": 3}),
    ("/v1/responses/input_tokens", {"model": "m", "input": RESPONSE["input"], "instructions": "x"}),
    ("/v1/messages", MESSAGES),
    ("/v1/messages/count_tokens", {key: MESSAGES[key] for key in ("model", "messages", "system", "tools")}),
    ("/tokenize", {"prompt": "hello", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {key: CHAT[key] for key in ("model", "messages", "chat_template_kwargs")}),
    ("/detokenize", {"model": "m", "tokens": [1, 2, 300]}),
    ("/v1/batches", {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}),
]
_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.0, 1e-320, 1e308, 0.5, "", " ", "x", "\x00",
    "\ud800", "😀", "ａ", "a" * 5000, "5", "-1", "nan", [], [[]], [None], {}, {"": ""}, {"a": {"b": [1]}}, [1, "a"],
    float("nan"), float("inf"), ["x"] * 200, "{{ 1 }}", "<think>", "../../etc/passwd", "٣", "1e5",
]  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in it."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        at = stack.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            found.append((at, key))
            stack.append(at[key])
    return found


def _mutate(body: dict[str, Any], pick: random.Random) -> None:
    container, key = pick.choice(_places(body))
    kind = pick.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1:
        # Many only of what is small: lists of lists of many would fill the memory.
        many = 300 if len(repr(container[key])) < 100 else 2
        container[key] = [container[key]] * pick.choice((1, 2, many))
    elif kind == 2 and isinstance(container, dict):
        name = pick.choice(("", "x", key.upper(), "\ud800", "self", "__class__", "0"))
        container[name] = copy.deepcopy(container[key])
    elif kind == 3:
        container[key] = {pick.choice(("a", "type", "text", "role")): container[key]}
    else:
        container[key] = copy.deepcopy(pick.choice(_ODD))


def _damage(text: bytes, pick: random.Random) -> bytes:
    at = pick.randrange(len(text) + 1)
    return pick.choice(
        (
            text[:at],
            text[:at] + bytes([pick.randrange(256)]) + text[at + 1 :],
            text[:at]
            + pick.choice((b'"', b"{", b"]", b"\\", b"\x00", b"\xff", b"\\ud800", b"1e999", b","))
            + text[at:],
            text[at:],
            text + text,
            b"[" * pick.choice((10, 5000)) + text,
        )
    )


def mutated(seed: int) -> tuple[str, bytes]:
    """The seed-th (path, body)."""
    pick = random.Random(seed)
    path, body = copy.deepcopy(pick.choice(VALID))
    for _ in range(pick.choice((1, 1, 1, 2, 5))):
        if body:
            _mutate(body, pick)
    text = json.dumps(body, ensure_ascii=pick.random() < 0.7).encode("utf-8", "surrogatepass")
    return path, _damage(text, pick) if pick.random() < 0.15 else text
