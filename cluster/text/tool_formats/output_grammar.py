"""The llguidance Lark grammar of a whole output (after its thought) that has to call tools, or may call some that are
strict. White space before the first call is what models write there; after the last call the output ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from isotherm.cluster.text.tool_formats.base import Tool, ToolFormat
from isotherm.cluster.text.tool_formats.grammar import Literals


def grammar_of_calls(
    form: ToolFormat,
    tools: Sequence[Tool],
    control_tokens: Mapping[str, int],
    *,
    must_call: bool,
    parallel: bool,
    answer: str = "",
) -> str:
    """llguidance's grammar text. `must_call`: the output is calls, each by its tool's schema. Else it is a text with
    calls at its end or none, and those of tools that are not strict may have any arguments; `answer`: a grammar text of
    what stands in place of text where nothing is called. `control_tokens`: those of the vocabulary, text → id. Raises
    ToolSchemaError."""
    written = Literals(control_tokens)
    if not must_call:
        tools = [tool if tool.strict else replace(tool, parameters={}) for tool in tools]
    rules = form.rules(tools, written, parallel=parallel)
    calls = f"{written(form.lead)}? {written(form.opening)} calls" if form.lead else f"{written(form.opening)} calls"
    if must_call:
        return _lark(f"start: {calls}", *rules)
    if not answer:
        text_then = written.text_to("text_then", form.opening)
        return _lark("start: TEXT | text_then calls", "TEXT: /(?s:.*)/", text_then, *rules)
    # Another grammar is named in a list of grammars, of which the first counts.
    others = json.loads(answer)["grammars"] if answer.startswith("{") else [{"lark_grammar": answer}]
    first = {"name": "output", "lark_grammar": _lark(f"start: @answer | {calls}", *rules)}
    return json.dumps({"grammars": [first, {**others[0], "name": "answer"}, *others[1:]]}, ensure_ascii=False)


def _lark(*rules: str) -> str:
    return "\n".join([*rules, ""])
