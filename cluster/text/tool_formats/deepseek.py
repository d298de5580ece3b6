"""Tool calls as DeepSeek-V3 and R1 write them, and as V3.1 does.

    V3, R1  <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜>
    V3.1    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>

One parser reads both: models write the one where the other is expected. Source: the chat templates of the models'
repositories (deepseek-ai/DeepSeek-R1-0528 and DeepSeek-V3.1, tokenizer_config.json)."""

from __future__ import annotations

from collections.abc import Sequence

from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.grammar import Literals, call_list, object_rule
from isotherm.cluster.text.tool_formats.marked import FENCE, MarkedParser
from isotherm.cluster.text.tool_formats.reader import Reading

_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_TYPE = "function"


class DeepseekParser(MarkedParser):
    begins = (_SECTION, _CALL)
    inner = (_SEPARATOR, _CALL_END, _SECTION_END)
    call, separator, call_end, section_ends = _CALL, _SEPARATOR, _CALL_END, (_SECTION_END,)

    def _separated(self, header: str) -> Reading[tuple[str, str]]:
        yield from self._reader.spaces()
        brace = yield from self._reader.option("{")
        self._reader.back(brace)
        if header.strip() != _TYPE or brace:
            return self._named(header)
        name, marker = yield from self._reader.take_until("\n", "{", FENCE, *self._ends)
        self._reader.back(marker)
        # At the end of the output the name may be half of one.
        return (name.strip() if marker else ""), ""

    def _named(self, header: str) -> tuple[str, str]:
        name = header.strip()
        short = name.removeprefix(_TYPE).strip()
        return (short if self._offer.offers(short) and not self._offer.offers(name) else name), ""


class DeepseekV3(ToolFormat):
    name = "deepseek_v3"
    opening = _SECTION
    _before = f"{_TYPE}{_SEPARATOR}{{}}\n```json\n"
    _after = "\n```"
    _between = "\n"

    def shown_by(self, template: str) -> bool:
        return _SECTION in template and "```json" in template

    def parser(self, offer: Offer) -> ToolParser:
        return DeepseekParser(offer)

    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        rules = []
        for i, tool in enumerate(tools):
            begin = written(_CALL + self._before.format(tool.name))
            rules += [f"call_{i}: {begin} arguments_{i} {written(self._after + _CALL_END)}"]
            rules += [object_rule(f"arguments_{i}", tool)]
        listed = call_list(len(tools), written(self._between), parallel=parallel)
        return [f"calls: {listed} {written(_SECTION_END)}", *rules]


class DeepseekV31(DeepseekV3):
    name = "deepseek_v3.1"
    _before = f"{{}}{_SEPARATOR}"
    _after = _between = ""

    def shown_by(self, template: str) -> bool:
        return _SECTION in template and "```json" not in template
