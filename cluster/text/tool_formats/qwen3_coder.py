"""Tool calls as Qwen3-Coder and JoyAI-LLM-Flash write them.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

The line ends around a value are none of it; what it is, the schema of its argument decides. Models forget
`<tool_call>`, and line ends. Source: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct, of which JoyAI-LLM-Flash's
is made; for values, vLLM's parser `qwen3_coder`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isotherm.cluster.text.output import LastCall
from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.grammar import Literals, PairRules, call_list
from isotherm.cluster.text.tool_formats.pairs import PairParser
from isotherm.cluster.text.tool_formats.reader import Reading

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"[\w./:-]+")
_LINE_END = "\n"
_TAGS = (_PARAMETER, _PARAMETER_END, _FUNCTION_END, _CALL_END, _CALL, _FUNCTION)  # that may follow within a call
# What a value ends with: tags at the beginning of a line, and elsewhere its own end where the call goes on or ends
# there, for a value may be a text in which tags are spoken of.
_VALUE_ENDS = (
    *(_LINE_END + tag for tag in (_PARAMETER_END, _PARAMETER, _FUNCTION_END)),
    *(_PARAMETER_END + gap + tag for gap in ("", _LINE_END) for tag in (_PARAMETER, _FUNCTION_END, _CALL_END)),
    *(_FUNCTION_END + gap + _CALL_END for gap in ("", _LINE_END)),
    _LINE_END + _CALL_END,
    _CALL_END,
)


class Qwen3CoderParser(PairParser):
    begins = (_CALL, _FUNCTION)
    inner = (_CALL_END, _FUNCTION_END, _PARAMETER, _PARAMETER_END)
    untyped_is_text = True

    def _marked(self, marker: str) -> Reading[None]:
        self._in_calls, opened = True, marker
        if marker == _CALL:
            opened += yield from self._reader.spaces()
            marker = yield from self._reader.option(_FUNCTION)
            opened += marker
        if marker:
            yield from self._function(opened)
        else:
            self._say(opened)
        self._in_calls = False

    def _function(self, opened: str) -> Reading[None]:
        """What begins with `opened`: a call, or text where nothing that follows shows that one is meant."""
        reader = self._reader
        head, close = yield from reader.take_until(">", _LINE_END)
        name, gap, following = head.strip(), "", ""
        if close:
            gap = yield from reader.spaces()
            following = yield from reader.option(_PARAMETER, _FUNCTION_END, _CALL_END)
            reader.back(following)
        if _NAME.fullmatch(name) is None or not (following or (close and self._offer.offers(name))):
            self._say(opened + head + close + gap)
            return
        self._begin(name)
        last_call = yield from self._parameters_of_it()
        self._end(last_call)
        if last_call is LastCall.CLOSED and not self.is_over:
            gap = yield from reader.spaces()
            closed = yield from reader.option(_CALL_END)
            reader.back("" if closed else gap)

    def _parameters_of_it(self) -> Reading[LastCall]:
        """Reads up to the end of the function, and over it."""
        reader = self._reader
        while True:
            marker = yield from reader.until(*_TAGS, passed=self._say)
            if marker == _PARAMETER:
                key, close = yield from reader.take_until(">", _LINE_END)
                if not close:
                    self._say(_PARAMETER + key)  # a name that is cut off is text
                    return LastCall.OPEN
                if close == ">":
                    yield from reader.option(_LINE_END)
                marker = yield from self._pair(key.strip(), *_VALUE_ENDS)
                if not marker:
                    return LastCall.OPEN
                reader.back(marker)
            elif marker != _PARAMETER_END:
                reader.back("" if marker == _FUNCTION_END else marker)
                return LastCall.CLOSED if marker else LastCall.UNMARKED


class Qwen3Coder(ToolFormat):
    name = "qwen3_coder"
    opening = _CALL
    lead = _LINE_END

    def shown_by(self, template: str) -> bool:
        return all(tag in template for tag in (_CALL, _FUNCTION, _PARAMETER))

    def parser(self, offer: Offer) -> ToolParser:
        return Qwen3CoderParser(offer)

    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        before_key, after_key = written(_PARAMETER), written(">" + _LINE_END)

        def begin(key: str, is_string: bool) -> str:
            return f"{before_key} {key} {after_key}"

        end = written(_FUNCTION_END + _LINE_END + _CALL_END)
        pairs = PairRules(written, begin, _LINE_END + _PARAMETER_END, written(_LINE_END), typed=False)
        rules = []
        for i, tool in enumerate(tools):
            head = written(f"{_LINE_END}{_FUNCTION}{tool.name}>{_LINE_END}")
            rules += [f"call_{i}: {head} arguments_{i} {end}", *pairs(f"arguments_{i}", tool)]
        return [f"calls: {call_list(len(tools), written(_LINE_END + _CALL), parallel=parallel)}", *rules]
