"""A stream's events in any cut, and the reply that they are together."""

from __future__ import annotations

import json

import pytest

from isotherm.cluster.client.answers import (
    Choice,
    Chunk,
    Completion,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Usage,
    completion,
)
from isotherm.cluster.client.events import Events

HEAD = {"id": "chatcmpl-1", "model": "m", "system_fingerprint": "f"}


def line(choices, **more):
    return b"data: " + json.dumps({**HEAD, "choices": choices, **more}).encode() + b"\n\n"


def logprob(token, value, *top):
    entry = {"token": token, "logprob": value, "bytes": list(token.encode())}
    return {**entry, "top_logprobs": [logprob(*one) for one in top]}


def call(index, **fields):
    return {"tool_calls": [{"index": index, **fields}]}


STREAM = b"".join(
    [
        line([{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
        line([{"index": 1, "delta": {"content": "é"}, "logprobs": {"content": [logprob("é", -0.5, ("e", -1.0))]}}]),
        b": waiting\n\n",
        line([{"index": 0, "delta": {"reasoning_content": "hm", "reasoning": "hm"}}]),
        line([{"index": 0, "delta": call(0, id="c1", type="function", function={"name": "f", "arguments": ""})}]),
        line([{"index": 0, "delta": call(0, function={"arguments": '{"a"'})}]),
        line([{"index": 0, "delta": call(1, id="c2", function={"name": "g", "arguments": "{}"})}]),
        line([{"index": 0, "delta": call(0, function={"arguments": ": 1}"})}]),
        line([{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]),
        line(None),  # gateways send such
        line([{"index": 1, "delta": {"content": "\u2028b"}, "finish_reason": "stop"}]),
        line([], usage={"prompt_tokens": 3, "completion_tokens": 5}),
        b"data: [DONE]\n\n",
    ]
)
WHOLE = Completion(
    "chatcmpl-1",
    "m",
    (
        Choice(0, "", "tool_calls", "hm", (ToolCall("c1", "f", '{"a": 1}'), ToolCall("c2", "g", "{}"))),
        Choice(
            1,
            "é\u2028b",
            "stop",
            logprobs=(TokenLogprob("é", -0.5, "é".encode(), (TokenLogprob("e", -1.0, b"e"),)),),
        ),
    ),
    Usage(3, 5, 0),
    "f",
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_pieces_and_whole_do_not_depend_on_the_cut(size):
    events = Events()
    pieces = [chunk for at in range(0, len(STREAM), size) for chunk in events.feed(STREAM[at : at + size])]
    events.end()
    assert events.whole.completion() == WHOLE
    assert pieces[0].logprobs[0].top[0].token == "e" and pieces[1] == Chunk("", reasoning="hm")
    assert [piece.tool_calls for piece in pieces if piece.tool_calls] == [
        (ToolCallPiece(0, "c1", "f", ""),),
        (ToolCallPiece(0, "", "", '{"a"'),),
        (ToolCallPiece(1, "c2", "g", "{}"),),
        (ToolCallPiece(0, "", "", ": 1}"),),
    ]


def test_the_whole_is_what_the_same_reply_in_one_piece_gives():
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}},  # as some servers have it
    ]
    first = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls}
    body = {
        **HEAD,
        "choices": [
            {"index": 0, "message": first, "finish_reason": "tool_calls"},
            {
                "index": 1,
                "message": {"content": "é\u2028b"},
                "logprobs": {"content": [logprob("é", -0.5, ("e", -1.0))]},
                "finish_reason": "stop",
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
    }
    assert completion(body) == WHOLE and completion(body).body is body


def test_a_reply_is_a_message_of_the_next_turn():
    assert WHOLE.message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert WHOLE.choices[1].message == {"role": "assistant", "content": "é\u2028b"}
    assert Choice(0, "", "stop").message == {"role": "assistant", "content": ""}


def test_log_probabilities_of_completions():
    lists = {"tokens": ["a", "b"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"b": -0.5, "c": -2.0}]}
    text = {"text": "ab", "logprobs": {**lists, "text_offset": [0, 1]}}
    found = completion({"choices": [text]}).logprobs
    assert found == (
        TokenLogprob("a", None),
        TokenLogprob("b", -0.5, top=(TokenLogprob("b", -0.5), TokenLogprob("c", -2.0))),
    )
    assert completion({"choices": [{"text": "ab", "logprobs": {**lists, "top_logprobs": None}}]}).logprobs[1].top == ()


def test_what_has_come_so_far():
    events = Events()
    assert events.whole.completion().text == ""
    list(events.feed(line([{"delta": {"content": "ab"}}])))
    assert (events.whole.completion().text, events.whole.completion().finish_reason) == ("ab", None)
