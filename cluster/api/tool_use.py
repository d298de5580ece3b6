"""What the tools of a chat come to: whether the model can be offered them, and what makes calls of its output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

from isotherm.cluster.api.bodies.tools import ToolsBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.text.tool_formats.base import Offer, ToolFormat, ToolParser


def call_parsers(body: ToolsBody, form: ToolFormat | None, reply_id: str) -> Callable[[int], ToolParser] | None:
    """The parser of a choice's calls, by the choice's index; None where nothing may be called. `form`: the model's
    format of calls, if it is known. Raises ReplyError."""
    tools = body.callable_tools
    if not tools:
        return None
    if form is None:
        raise ReplyError(
            "tools: the form in which this model calls tools is not known: its chat template shows none that is, and "
            'the manifest\'s tool_format names none. With tool_choice "none" the model is told of them and calls none',
            param="tools",
        )
    known = form

    def parser(choice: int) -> ToolParser:
        return known.parser(Offer(tools, partial(_call_id, reply_id, choice), body.calls_in_parallel))

    return parser


def _call_id(reply_id: str, choice: int, index: int) -> str:
    """The id of a call: the same however often its reply is made."""
    return f"call_{hashlib.blake2b(f'{reply_id}/{choice}/{index}'.encode(), digest_size=12).hexdigest()}"
