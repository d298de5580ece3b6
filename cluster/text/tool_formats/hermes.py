"""Tool calls as Hermes, Qwen and the many models trained after them write them.

    <tool_call>
    {"name": NAME, "arguments": ARGUMENTS}
    </tool_call>

The members may come in any order; arguments that come before the name wait for it. A tag in a string of the
arguments is a part of it. Source: the chat template of NousResearch/Hermes-3-Llama-3.1-8B (tool_use)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from isotherm.cluster.text.output import LastCall
from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.grammar import Literals, call_list, object_rule
from isotherm.cluster.text.tool_formats.reader import Reading

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_ARGUMENTS = ("arguments", "parameters")


class HermesParser(ToolParser):
    begins = (_CALL,)
    inner = (_CALL_END,)

    def _marked(self, marker: str) -> Reading[None]:
        gap = yield from self._reader.spaces()
        brace = yield from self._reader.option("{")
        self._raw = _CALL + gap + brace  # of a call whose name is not known yet: text, should there be none
        self._called = self._closed = False
        self._waiting = ""  # arguments
        if brace:
            self._in_calls = True
            yield from self._members()
        if self._called:
            self._close(self._last_of_all())
            if not self.is_over:
                marker = yield from self._reader.until(_CALL_END, _CALL, passed=self._say)
                self._reader.back(marker if marker == _CALL else "")
        else:
            self._say(self._raw)
        self._in_calls = False

    def _last_of_all(self) -> LastCall:
        """How far the call has come, after its object or what there is of it."""
        if self._closed or not self._reader.is_done:
            return LastCall.CLOSED
        return LastCall.OPEN if self._argued else LastCall.UNMARKED

    def _members(self) -> Reading[None]:
        """Reads over the object, up to its end or to what is none of it."""
        reader = self._reader
        while True:
            self._read_over((yield from reader.spaces()))
            mark = yield from reader.option('"', ",", "}")
            self._read_over(mark)
            if mark == ",":
                continue
            if mark != '"':
                self._closed |= mark == "}"
                return
            key, closed = yield from self._string()
            self._read_over((yield from reader.spaces()))
            colon = yield from reader.option(":")
            self._read_over(colon)
            if not (closed and colon):
                return
            self._read_over((yield from reader.spaces()))
            yield from self._value(key)

    def _value(self, key: str) -> Reading[None]:
        mark = yield from self._reader.option('"', "{", "[")
        if mark == '"':
            self._read_over(mark)
            text, closed = yield from self._string()
            if key == "name" and closed and text and not self._called:
                self._called = True
                self._open(text)
                self._argue(self._waiting)
            elif key in _ARGUMENTS:
                self._arguments(text)  # JSON in a string
                self._closed = closed
        elif mark:
            self._reader.back(mark)
            passed = self._arguments if key in _ARGUMENTS else self._read_over
            marker = yield from self._reader.json_value(_CALL_END, _CALL, passed=passed)
            self._closed |= key in _ARGUMENTS and self._reader.was_closed
            self._reader.back(marker)
        else:
            text, marker = yield from self._reader.take_until(",", "}", _CALL_END)
            self._read_over(text)
            self._reader.back(marker)

    def _arguments(self, text: str) -> None:
        self._read_over(text)
        if self._called:
            self._argue(text)
        else:
            self._waiting += text

    def _string(self) -> Reading[tuple[str, bool]]:
        """A string's value, and whether it was closed."""
        text, closed = yield from self._reader.string()
        self._read_over(text + ('"' if closed else ""))
        try:
            value = str(json.loads(f'"{text}"', strict=False))
            value.encode()  # not with half of a surrogate pair
        except ValueError:
            return text, closed
        return value, closed

    def _read_over(self, text: str) -> None:
        if not self._called:
            self._raw += text


class Hermes(ToolFormat):
    name = "hermes"
    opening = _CALL
    lead = "\n"

    def shown_by(self, template: str) -> bool:
        # Others have the same tag around calls of another form, Qwen3-Coder among them.
        return _CALL in template and "<function=" not in template

    def parser(self, offer: Offer) -> ToolParser:
        return HermesParser(offer)

    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        rules = []
        for i, tool in enumerate(tools):
            begin = written(f'\n{{"name": "{tool.name}", "arguments": ')
            rules += [f"call_{i}: {begin} arguments_{i} {written('}' + chr(10) + _CALL_END)}"]
            rules += [object_rule(f"arguments_{i}", tool)]
        return [f"calls: {call_list(len(tools), written(chr(10) + _CALL), parallel=parallel)}", *rules]
