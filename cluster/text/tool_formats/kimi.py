"""Tool calls as Kimi K2 writes them.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>ARGUMENTS
    <|tool_call_end|><|tool_calls_section_end|>

A call's id is `functions.NAME:INDEX`: its template writes ids back into the prompt, and the model counts on. Source:
the chat template and docs/tool_call_guidance.md of moonshotai/Kimi-K2-Instruct."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.grammar import Literals, call_list, object_rule
from isotherm.cluster.text.tool_formats.marked import MarkedParser

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_ONE_SECTION, _ONE_SECTION_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"  # the model slips into them
_CALL, _SEPARATOR, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_HEADER = re.compile(r"(?:functions\.)?(.*?)(?::([0-9]{1,9}))?", re.DOTALL)


class KimiParser(MarkedParser):
    begins = (_SECTION, _ONE_SECTION, _CALL)
    inner = (_SEPARATOR, _CALL_END, _SECTION_END, _ONE_SECTION_END)
    call, separator, call_end, section_ends = _CALL, _SEPARATOR, _CALL_END, (_SECTION_END, _ONE_SECTION_END)

    def __init__(self, offer: Offer) -> None:
        self._ids: set[str] = set()
        super().__init__(offer)

    def _named(self, header: str) -> tuple[str, str]:
        match = _HEADER.fullmatch(header.strip())
        assert match is not None  # it takes any text
        name, index = match[1], match[2]
        if name.isdigit() or not name:  # the counter alone
            name = self._offer.tools[0].name if len(self._offer.tools) == 1 else ""
        at = self._count if index is None else int(index)
        while (call_id := f"functions.{name}:{at}") in self._ids:
            at += 1
        return name, call_id

    def _open(self, name: str, call_id: str = "") -> None:
        self._ids.add(call_id)
        super()._open(name, call_id)


class KimiK2(ToolFormat):
    name = "kimi_k2"
    opening = _SECTION

    def shown_by(self, template: str) -> bool:
        return _SECTION in template

    def parser(self, offer: Offer) -> ToolParser:
        return KimiParser(offer)

    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        rules = []
        for i, tool in enumerate(tools):
            begin = f"{written(f'{_CALL}functions.{tool.name}:')} /[0-9]{{1,4}}/ {written(_SEPARATOR)}"
            rules += [f"call_{i}: {begin} arguments_{i} {written(_CALL_END)}", object_rule(f"arguments_{i}", tool)]
        return [f"calls: {call_list(len(tools), '', parallel=parallel)} {written(_SECTION_END)}", *rules]
