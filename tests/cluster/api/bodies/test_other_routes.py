"""A field of one route is a field on each other one, refused with what to do instead, or known to mean nothing."""

from __future__ import annotations

import json

import pytest

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.messages import Conversation, MessagesBody
from isotherm.cluster.api.bodies.other_routes import CHAT, COMPLETIONS, MESSAGES, OTHER_ROUTES, RESPONSES
from isotherm.cluster.api.bodies.responses import ResponsesBody
from isotherm.cluster.api.bodies.translated import _CHAT_FIELDS
from isotherm.cluster.api.bodies.unserved import HARMLESS
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import PromptLimits, Served
from isotherm.cluster.api.prepare_messages import count_tokens
from isotherm.cluster.api.tokenization import tokenize

SAID = [{"role": "user", "content": "x"}]
MINIMAL = {
    ChatBody: {"messages": SAID},
    CompletionBody: {"prompt": "x"},
    ResponsesBody: {"input": "x"},
    MessagesBody: {"messages": SAID, "max_tokens": 4},
    Conversation: {"messages": SAID},
}
BODIES = [body for body in MINIMAL if body is not Conversation]


def fields(body):
    return {field.alias or name for name, field in body.model_fields.items()}


def refusal(body, **given):
    with pytest.raises(ReplyError) as info:
        parse_body(body, json.dumps({"model": "m", **MINIMAL[body], **given}).encode())
    assert info.value.status == 400
    return info.value


@pytest.mark.parametrize("body", BODIES)
def test_a_field_of_another_route_is_known(body):
    passed = _CHAT_FIELDS if body in (ResponsesBody, MessagesBody) else set()
    known = fields(body) | body.neutral.keys() | body.renamed.keys() | HARMLESS.keys() | passed
    known |= getattr(body, "older", {}).keys()
    for other in BODIES:
        assert not (fields(other) | other.neutral.keys()) - known, other


@pytest.mark.parametrize("body", MINIMAL)
def test_what_is_said_to_be_elsewhere_is_refused_with_where(body):
    assert not body.renamed.keys() & (fields(body) | body.neutral.keys() | HARMLESS.keys())
    for name, instead in body.renamed.items():
        error = refusal(body, **{name: "x"})
        assert error.param == name and error.message.startswith(f"{name} is no field of this route")
        assert error.message.endswith(instead)
        parse_body(body, json.dumps({"model": "m", **MINIMAL[body], name: None}).encode())


def test_what_to_give_instead_is_there():
    bodies = {body.route: body for body in BODIES}
    assert bodies.keys() == {CHAT, COMPLETIONS, RESPONSES, MESSAGES}
    for name, places in OTHER_ROUTES.items():
        for route, instead in places.items():
            if instead.startswith("/"):
                assert name in fields(bodies[instead]) | getattr(bodies[instead], "older", {}).keys()
            elif instead and " role " not in instead:
                for one in instead.split(" and "):
                    assert one.partition(".")[0] in fields(bodies[route]), (name, route)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (ChatBody, "max_output_tokens suffix instructions system input prompt previous_response_id text"),
        (CompletionBody, "messages input max_output_tokens system instructions functions output_config mcp_servers"),
        (ResponsesBody, "system suffix prompt mcp_servers output_config"),
        (MessagesBody, "instructions input prompt suffix previous_response_id text truncation"),
    ],
)
def test_fields_that_were_once_ignored(body, names):
    for name in names.split():
        if name in _CHAT_FIELDS and body in (ResponsesBody, MessagesBody):
            continue  # which the chat that is made of it refuses
        assert refusal(body, **{name: ["x"]}).param == name


@pytest.fixture
def served(tokenizer):
    return Served(("m",), tokenizer, PromptLimits(4096, 1000, 40960))


def test_what_is_counted_is_no_other_than_what_is_asked(served):
    base = {"model": "m", "messages": SAID}
    of_no_account = {"stop_sequences": ["a"], "temperature": 1, "n_keep": -1}
    assert count_tokens(json.dumps({**base, **of_no_account}).encode(), served)
    for name in ("input_ids", "prompt", "truncation"):
        with pytest.raises(ReplyError) as info:
            count_tokens(json.dumps({**base, name: [1]}).encode(), served)
        assert info.value.param == name


def test_a_text_and_a_chat_are_not_tokenized_at_once(served):
    for body, param in (
        ({"prompt": "x", "messages": SAID}, "prompt"),
        ({"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": "x", "system": "y"}, "system"),
        ({"messages": SAID, "input": "y"}, "input"),
    ):
        with pytest.raises(ReplyError) as info:
            tokenize(json.dumps(body).encode(), served)
        assert (info.value.status, info.value.param) == (400, param)
    assert tokenize(json.dumps({"prompt": "x", "messages": None, "tools": []}).encode(), served)["count"]
    assert tokenize(json.dumps({"prompt": None, "messages": SAID}).encode(), served)["count"]
