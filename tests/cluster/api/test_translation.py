from __future__ import annotations

import pytest

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.translation import Translation

ORIGINS = {
    "messages": "input",
    "messages[2]": "input[5]",
    "messages[2].tool_calls[0]": "input[6]",
    "tools[1].function": "tools[1]",
    "tools[1].function.parameters": "tools[1].input_schema",
    "stop": "stop_sequences",
    "reasoning_effort": "reasoning.effort",
}


@pytest.mark.parametrize(
    ("param", "message", "mapped", "said"),
    [
        ("messages", "messages: too long", "input", "input: too long"),
        ("messages[2].content", "messages[2].content: wrong", "input[5]", "input[5]: wrong"),
        ("messages[2].tool_calls[0].id", "messages[2].tool_calls[0].id: no", "input[6]", "input[6]: no"),
        ("messages[7].role", "messages[7].role: no", "input", "input: no"),
        ("tools[1].function.name", "tools[1].function.name: no", "tools[1].name", "tools[1].name: no"),
        (
            "tools[1].function.parameters.a",
            "it is wrong",
            "tools[1].input_schema.a",
            "tools[1].input_schema.a: it is wrong",
        ),
        ("stop[3]", "stop[3]: too long", "stop_sequences[3]", "stop_sequences[3]: too long"),
        ("reasoning_effort", "reasoning_effort is not known", "reasoning.effort", "reasoning.effort is not known"),
        ("temperature", "temperature: too hot", "temperature", "temperature: too hot"),
        ("stopper", "stopper: what", "stopper", "stopper: what"),
        (None, "a fault", None, "a fault"),
    ],
)
def test_an_error_is_about_the_field_that_was_given(param, message, mapped, said):
    error = ReplyError(message, param=param, status=404, code="x", kind="y", headers={"retry-after": "1"})
    there = Translation({}, ORIGINS).at_origin(error)
    assert (there.param, there.message) == (mapped, said)
    assert (there.status, there.code, there.kind, there.headers) == (404, "x", "y", {"retry-after": "1"})
