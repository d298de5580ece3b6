"""An output parser for tests of what replies make of tool calls: `<call NAME>ARGUMENTS</call>`, after a thought if
there is one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from isotherm.cluster.text.output import OutputFields, ToolCallPiece
from isotherm.cluster.text.think_parser import ThinkParser

_OPEN, _CLOSE = "<call ", "</call>"


class CallParser:
    def __init__(self, prompt: str) -> None:
        self._think = ThinkParser(prompt)
        self._held = ""
        self._calls = 0
        self._in_call = False

    @property
    def tags(self) -> Collection[str]:
        return self._think.tags

    @property
    def is_reasoning(self) -> bool:
        return self._think.is_reasoning

    def feed(self, text: str) -> OutputFields:
        return self._split(self._think.feed(text))

    def finish(self) -> OutputFields:
        fields = self._split(self._think.finish())
        held, self._held = self._held, ""
        if self._in_call:
            return replace(fields, tool_calls=(*fields.tool_calls, ToolCallPiece(self._calls - 1, arguments=held)))
        return replace(fields, content=fields.content + held)

    def _split(self, fields: OutputFields) -> OutputFields:
        """What follows a call waits for the next piece: in one piece content comes before calls."""
        self._held += fields.content
        content = "" if self._in_call else self._before(_OPEN)
        calls: list[ToolCallPiece] = []
        if not self._in_call and self._held.startswith(_OPEN) and ">" in self._held:
            name, _, self._held = self._held.removeprefix(_OPEN).partition(">")
            calls.append(ToolCallPiece(self._calls, f"call_{self._calls}", name))
            self._calls, self._in_call = self._calls + 1, True
        if self._in_call:
            if arguments := self._before(_CLOSE):
                calls.append(ToolCallPiece(self._calls - 1, arguments=arguments))
            if self._held.startswith(_CLOSE):
                self._held, self._in_call = self._held.removeprefix(_CLOSE), False
        return replace(fields, content=content, tool_calls=tuple(calls))

    def _before(self, tag: str) -> str:
        """Takes what stands before the tag, or before what may become it."""
        at = self._held.find(tag)
        if at < 0:
            at = next(i for i in range(len(self._held) + 1) if tag.startswith(self._held[i:]))
        text, self._held = self._held[:at], self._held[at:]
        return text
