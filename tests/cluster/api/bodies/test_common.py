from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.messages import Conversation, MessagesBody
from isotherm.cluster.api.bodies.responses import ResponsesBody
from isotherm.cluster.api.bodies.tokenization import DetokenizeBody, TokenizeChatBody


def lists(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        for inner in schema.values():
            yield from lists(inner)
    elif isinstance(schema, list | tuple):
        for inner in schema:
            yield from lists(inner)


@pytest.mark.parametrize(
    "body", [ChatBody, CompletionBody, Conversation, MessagesBody, ResponsesBody, TokenizeChatBody, DetokenizeBody]
)
def test_every_list_of_a_body_ends_with_its_first_wrong_element(body):
    found = list(lists(body.__pydantic_core_schema__))
    assert found and all(one.get("fail_fast") for one in found), [one for one in found if not one.get("fail_fast")]
