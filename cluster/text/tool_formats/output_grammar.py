"""The llguidance Lark grammar of a whole output (after its thought) that has to call tools, or may call some that are
strict. White space before the first call is what models write there; after the last call the output ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from isotherm.cluster.text.tool_formats.base import Tool, ToolFormat
from isotherm.cluster.text.tool_formats.grammar import Literals


def output_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    control_tokens: Mapping[str, int],
    *,
    must_call: bool,
    parallel: bool,
    answer: str = "",
) -> str:
    """`must_call`: the output is calls, each by its tool's schema. Else it is a text with calls at its end or none,
    and those of tools that are not strict may have any arguments; `answer`: the right side of a Lark rule for what may
    stand in place of a text and calls. `control_tokens`: those of the vocabulary, text → id. Raises ToolSchemaError."""
    written = Literals(control_tokens)
    if not must_call:
        tools = [tool if tool.strict else replace(tool, parameters={}) for tool in tools]
    calls = "\n".join(form.rules(tools, written, parallel=parallel))
    lead = f"{json.dumps(form.lead)}?" if form.lead else ""
    if must_call:
        head = [f"start: {lead} {written(form.opening)} calls"]
    elif answer:
        head = [f"start: answer | {lead} {written(form.opening)} calls", f"answer: {answer}"]
    else:
        head = ["start: TEXT | text_then calls", "TEXT: /(?s:.*)/", written.text_to("text_then", form.opening)]
    return "\n".join([*head, calls, ""])
