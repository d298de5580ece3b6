"""Calls whose arguments are pairs of a key and a bare value between tags: what the formats of DeepSeek-V3.2, GLM and
Qwen3-Coder have in common. A string's characters come as they are written; any other value comes whole, since only its
end shows what it is."""

from __future__ import annotations

import json
from typing import ClassVar

from isotherm.cluster.text.output import LastCall
from isotherm.cluster.text.tool_formats.base import ToolParser
from isotherm.cluster.text.tool_formats.reader import Reading
from isotherm.cluster.text.tool_formats.values import argument, as_json, types


class PairParser(ToolParser):
    """The parser of such a format: makes an object of the pairs."""

    untyped_is_text: ClassVar[bool] = False  # a value of which neither the model nor the schema says what it is

    def _begin(self, name: str) -> None:
        self._parameters = self._offer.parameters(name)
        self._pairs = 0
        self._whole = True  # the last value has come to its end
        self._open(name)

    def _end(self, last_call: LastCall) -> None:
        """The end of a call. One that the output ended within a value stays open: it is not the call that was meant."""
        if self._pairs and self._whole:
            self._argue("}")
        self._close(last_call if self._whole else LastCall.OPEN)

    def _pair(self, key: str, *ends: str, is_string: bool | None = None) -> Reading[str]:
        """Reads a value up to one of the ends, which it gives. `is_string`: what the model said of it; None: nothing,
        so that the schema of the argument decides."""
        self._argue(("{" if self._pairs == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._pairs += 1
        schema = argument(self._parameters, key)
        allowed = types(schema, self._parameters)
        by_schema = allowed == {"string"} or (self.untyped_is_text and not allowed)
        if is_string or (is_string is None and by_schema):
            self._argue('"')
            marker = yield from self._reader.until(*ends, passed=lambda text: self._argue(_escaped(text)))
            self._whole = bool(marker)
            self._argue('"' if self._whole else "")
        else:
            raw, marker = yield from self._reader.take_until(*ends)
            self._whole = bool(marker)
            self._argue(as_json(raw, allowed - {"string"} if is_string is False else allowed) if marker else raw)
        return marker


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
