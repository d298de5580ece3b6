"""Tool calls as DeepSeek-V3.2 writes them, in tags of its own markup.

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

`string` says whether the value is text as it stands, or JSON. V4 says `tool_calls` for `function_calls`; an invoke may
hold a JSON object instead of parameters. A tag that is missing its end is ended by the next tag. Source:
encoding/encoding_dsv32.py of deepseek-ai/DeepSeek-V3.2."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isotherm.cluster.text.output import LastCall
from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.grammar import Literals, PairRules, call_list
from isotherm.cluster.text.tool_formats.pairs import PairParser
from isotherm.cluster.text.tool_formats.reader import Reading

_TOKEN = "｜DSML｜"
_SECTIONS = (f"<{_TOKEN}function_calls>", f"<{_TOKEN}tool_calls>")
_SECTION_ENDS = (f"</{_TOKEN}function_calls>", f"</{_TOKEN}tool_calls>")
_INVOKE, _INVOKE_END = f"<{_TOKEN}invoke", f"</{_TOKEN}invoke>"
_PARAMETER, _PARAMETER_END = f"<{_TOKEN}parameter", f"</{_TOKEN}parameter>"
_ATTRIBUTE = re.compile(r'\b(name|string)\s*=\s*"([^"]*)"')


class DsmlParser(PairParser):
    begins = (*_SECTIONS, _INVOKE)
    inner = (*_SECTION_ENDS, _INVOKE_END)

    @property
    def tags(self) -> tuple[str, ...]:
        # The token that its tags have in common, in vocabularies that have it.
        return () if self.is_over else (_TOKEN,)

    def _marked(self, marker: str) -> Reading[None]:
        self._in_calls = marker not in _SECTION_ENDS
        if marker == _INVOKE:
            yield from self._invoke()

    def _invoke(self) -> Reading[None]:
        reader, ends = self._reader, (*_SECTION_ENDS, *self.begins)
        head, close = yield from reader.take_until(">", "\n")
        name = _attributes(head).get("name", "")
        if not name or not close:
            self._say(_INVOKE + head + close)
            return
        self._begin(name)
        yield from reader.spaces()
        brace = yield from reader.option("{")
        reader.back(brace)
        if brace:
            marker = yield from reader.json_value(_INVOKE_END, *ends, passed=self._argue)
            reader.back(marker)
        last_call = LastCall.UNMARKED
        if brace:
            last_call = LastCall.CLOSED if reader.was_closed else LastCall.OPEN
        while True:
            marker = yield from reader.until(_PARAMETER, _PARAMETER_END, _INVOKE_END, *ends, passed=self._say)
            if marker == _PARAMETER:
                head, close = yield from reader.take_until(">")
                if not close:
                    last_call = LastCall.OPEN
                    break
                said = _attributes(head)
                is_string = {"true": True, "false": False}.get(said.get("string", ""))
                closes = (_PARAMETER_END, _PARAMETER, _INVOKE_END, *ends)
                marker = yield from self._pair(said.get("name", ""), *closes, is_string=is_string)
                if marker != _PARAMETER_END:
                    reader.back(marker)
                    if not marker:
                        break
            elif marker != _PARAMETER_END:
                last_call = LastCall.CLOSED if marker else last_call
                if marker != _INVOKE_END:
                    reader.back(marker)
                break
        self._end(last_call)


def _attributes(head: str) -> dict[str, str]:
    return dict(_ATTRIBUTE.findall(head))


class DeepseekV32(ToolFormat):
    name = "deepseek_v3.2"
    opening = _SECTIONS[0]
    lead = "\n\n"

    def shown_by(self, template: str) -> bool:
        return _TOKEN in template

    def parser(self, offer: Offer) -> ToolParser:
        return DsmlParser(offer)

    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        before_key = written(f'{_PARAMETER} name="')

        def begin(key: str, is_string: bool) -> str:
            said = '" string="true">' if is_string else '" string="false">'
            return f"{before_key} {key} {written(said)}"

        end_of_line = written("\n")
        pairs = PairRules(written, begin, _PARAMETER_END, end_of_line, typed=True)
        rules = []
        for i, tool in enumerate(tools):
            head = written(f'{_INVOKE} name="{tool.name}">\n')
            rules += [f"call_{i}: {head} arguments_{i} {written(_INVOKE_END)}", *pairs(f"arguments_{i}", tool)]
        listed = call_list(len(tools), end_of_line, parallel=parallel)
        return [f"calls: {end_of_line} {listed} {end_of_line} {written(_SECTION_ENDS[0])}", *rules]
