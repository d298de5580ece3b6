"""What has a name here is what a request may have."""

from __future__ import annotations

from typing import get_type_hints

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.client.params import ChatParams, CompletionParams, Copies, Operation
from isotherm.cluster.messages.operations import CopyTarget
from isotherm.cluster.messages.operations import Operation as Record


def test_every_field_of_a_body_can_be_given_by_its_name():
    given = {"messages", "prompt", "stream", "chat_template"}  # by the calls themselves; the last is always refused
    for body, params in ((ChatBody, ChatParams), (CompletionBody, CompletionParams)):
        assert set(body.model_fields) - given <= set(get_type_hints(params))


def test_operations_are_as_the_server_tells_them():
    record = Record("op-1", {}, "api", 0.0, "", False)
    told = set(record.as_dict()) | {"waiting"}  # which cluster/deploy/revisions.py adds
    assert told == set(get_type_hints(Operation))
    assert set(CopyTarget.model_fields) == set(get_type_hints(Copies))
