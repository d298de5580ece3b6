"""Tool calls as GLM-4.5 and its successors write them.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

From GLM-4.7 on without the line ends. What a value is, the schema of its argument decides. Source: the chat templates
of zai-org/GLM-4.5 and GLM-4.7."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isotherm.cluster.text.output import LastCall
from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.grammar import Literals, PairRules, call_list
from isotherm.cluster.text.tool_formats.pairs import PairParser
from isotherm.cluster.text.tool_formats.reader import Reading

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[\w.:-]+")


class GlmParser(PairParser):
    begins = (_CALL,)
    inner = (_CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END)

    def _marked(self, marker: str) -> Reading[None]:
        self._in_calls = marker == _CALL
        if marker == _CALL:
            yield from self._call()
            self._in_calls = False

    def _call(self) -> Reading[None]:
        gap = yield from self._reader.spaces()
        head, marker = yield from self._reader.take_until("\n", _KEY, _CALL_END, _CALL)
        name, meant = head.strip(), marker in (_KEY, _CALL_END)
        if marker == "\n":
            marker += yield from self._reader.spaces()
            following = yield from self._reader.option(_KEY, _CALL_END)
            marker, meant = marker + following, bool(following) or self._offer.offers(name)
        self._reader.back(marker)
        if not meant or _NAME.fullmatch(name) is None:
            self._say(_CALL + gap + head)  # the tag alone may be spoken of: what follows shows that a call is meant
            return
        self._begin(name)
        last_call = LastCall.UNMARKED
        while True:
            marker = yield from self._reader.until(_KEY, _VALUE, _CALL_END, _CALL, passed=self._say)
            if marker == _KEY:
                key, marker = yield from self._reader.take_until(_KEY_END, _VALUE, _KEY, _CALL_END, _CALL)
                if marker == _KEY_END:
                    gap, marker = yield from self._reader.take_until(_VALUE, _KEY, _CALL_END, _CALL)
                if marker == _VALUE:
                    marker = yield from self._pair(key.strip(), _VALUE_END, _KEY, _CALL_END)
                    if marker == _VALUE_END:
                        continue
                self._reader.back(marker)
                if not marker:
                    last_call = LastCall.OPEN
            elif marker != _VALUE:
                last_call = LastCall.CLOSED if marker else last_call
                break
            if not marker:
                break
        if marker == _CALL:
            self._reader.back(marker)
        self._end(last_call)


class Glm4(ToolFormat):
    name = "glm4"
    opening = _CALL
    lead = "\n"

    def shown_by(self, template: str) -> bool:
        return _KEY in template

    def parser(self, offer: Offer) -> ToolParser:
        return GlmParser(offer)

    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        gap = '"\\n"?'  # which the older of the models write

        def begin(key: str, is_string: bool) -> str:
            return f"{written(_KEY)} {key} {written(_KEY_END)} {gap} {written(_VALUE)}"

        pairs = PairRules(written, begin, _VALUE_END, gap, typed=False)
        rules = []
        for i, tool in enumerate(tools):
            rules += [f"call_{i}: {written(tool.name)} {gap} arguments_{i} {written(_CALL_END)}"]
            rules += pairs(f"arguments_{i}", tool)
        return [f"calls: {call_list(len(tools), f'{gap} {written(_CALL)}', parallel=parallel)}", *rules]
