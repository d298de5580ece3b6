from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event

from isotherm.cluster.api.choices import ChoiceDelta, merged
from isotherm.cluster.api.messages_reply import MessagesReply
from isotherm.cluster.api.replies import Usage
from isotherm.cluster.text.output import OutputFields, ToolCallPiece

USED = Usage(10, 5, 3, 1)


def deltas(arguments, finish, *others, cut=False):
    pieces = [ToolCallPiece(0, "c", "f"), *(ToolCallPiece(0, arguments=char) for char in arguments)]
    fields = [OutputFields(tool_calls=(piece,)) for piece in pieces]
    *head, last = [*(ChoiceDelta(0, one) for one in fields), *others]
    return [*head, ChoiceDelta(0, last.fields, finish_reason=finish, cuts_call=cut)]


def whole(parts):
    return MessagesReply("msg_1", "m", 10, False).whole([merged(parts)], USED)


@pytest.mark.parametrize(
    "wrong",
    [
        '{"a": [1, 2',
        "nonsense",
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": [-1e999]}',
        '{"a": "\\ud800"}',
        "[]",
        '{"a": 1} x',
    ],
)
def test_arguments_that_are_no_object_are_shown_as_they_are(wrong):
    message = whole(deltas(wrong, "tool_calls"))
    assert message["content"][0]["input"] == {"INVALID_JSON": wrong}
    json.dumps(message, allow_nan=False).encode()


def test_arguments_are_given_as_far_as_they_came():
    message = whole(deltas('{"a": [true, "x y', "length", cut=True))
    assert message["content"][0]["input"] == {"a": [True]} and message["stop_reason"] == "max_tokens"
    assert whole(deltas("", "length", cut=True))["content"][0]["input"] == {}
    other = OutputFields(tool_calls=(ToolCallPiece(1, "d", "f", '{"b": 1, '),))
    two = whole(deltas('{"a": 1, ', "stop", ChoiceDelta(0, other), cut=True))
    assert [block["input"] for block in two["content"]] == [{"INVALID_JSON": '{"a": 1, '}, {"b": 1}]


ARGUMENTS = '{"a": [true, "x\\ny", {"b": -3.5e1}], "c": null, "d": "\\u00e9"}'


@pytest.mark.parametrize("end", range(1, len(ARGUMENTS)))
def test_a_cut_call_is_what_anthropics_client_makes_of_the_stream(end):
    parts = deltas(ARGUMENTS[:end], "stop", cut=True)
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events(MessagesReply("msg_1", "m", 10, False), parts):
        if event["type"] != "ping":
            snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    assert whole(parts)["content"][0]["input"] == snapshot.content[0].input


def events(reply, parts):
    text = (b"".join(map(reply.events, parts)) + reply.end(USED)).decode()
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    assert all(head == f"event: {json.loads(data[6:])['type']}" for head, data in blocks)
    return [json.loads(data[6:]) for _, data in blocks]


def test_text_after_a_call_is_a_block_of_its_own_in_both():
    parts = deltas("{}", "tool_calls", ChoiceDelta(0, OutputFields("\n")), ChoiceDelta(0, OutputFields("done")))
    assert [block["type"] for block in whole(parts)["content"]] == ["tool_use", "text"]
    sent = events(MessagesReply("msg_1", "m", 10, False), parts)
    assert [event["index"] for event in sent if event["type"] == "content_block_start"] == [0, 1]
    assert [event["delta"] for event in sent if event["type"] == "content_block_delta"][-1]["text"] == "\ndone"
    assert sent[-2]["usage"] == whole(parts)["usage"] and sent[-1] == {"type": "message_stop"}
    assert sent[-2]["usage"]["input_tokens"] == 7 and sent[-2]["usage"]["cache_read_input_tokens"] == 3
