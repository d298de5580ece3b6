"""Calls between control tokens with arguments in JSON: what DeepSeek's formats up to V3.1 and Kimi K2's have in common.

    SECTION (CALL header SEPARATOR arguments CALL_END)+ SECTION_END

Where a call's end or the section's is missing, the call ends with its arguments, or with what follows. What a string
of the arguments has of markers is a part of it, but for its very end."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from isotherm.cluster.text.output import LastCall
from isotherm.cluster.text.tool_formats.base import ToolParser
from isotherm.cluster.text.tool_formats.reader import Reading

FENCE = "```"


class MarkedParser(ToolParser):
    """The parser of such a format."""

    call: ClassVar[str]
    separator: ClassVar[str]
    call_end: ClassVar[str]
    section_ends: ClassVar[tuple[str, ...]]

    def _marked(self, marker: str) -> Reading[None]:
        # Between calls, markers that are out of place are left out: they are no text.
        self._in_calls = marker not in self.section_ends
        if marker == self.call:
            yield from self._call()

    @property
    def _ends(self) -> tuple[str, ...]:
        """What a call ends with, at the latest."""
        return (self.call_end, *self.section_ends, *self.begins)

    def _call(self) -> Reading[None]:
        header, marker = yield from self._reader.take_until(self.separator, "{", FENCE, *self._ends)
        if marker == self.separator:
            name, call_id = yield from self._separated(header)
        else:
            # Without a separator, arguments show that it is a call, or the name of a tool that takes none.
            name, call_id = self._named(header)
            arguments = marker in ("{", FENCE)
            if not (arguments or (marker and self._offer.offers(name))):
                name = ""
            self._reader.back(marker)
        if not name:
            self._say(header)  # nobody knows what was to be called
            return
        self._open(name, call_id)
        yield from self._arguments()

    def _separated(self, header: str) -> Reading[tuple[str, str]]:
        """The name, "" where there is none, and the id, "" where the format has none, of a call with a separator after
        its header. Reads what comes before the arguments."""
        yield from ()
        return self._named(header)

    @abstractmethod
    def _named(self, header: str) -> tuple[str, str]:
        """The same of a header alone."""

    def _arguments(self) -> Reading[None]:
        reader = self._reader
        yield from reader.spaces()
        fenced = yield from reader.option(FENCE)
        if fenced:
            yield from reader.option("json")
            yield from reader.spaces()
        ends = ("\n" + FENCE, *self._ends) if fenced else self._ends
        marker = yield from reader.json_value(*ends, passed=self._argue)
        unclosed = LastCall.OPEN if self._argued else LastCall.UNMARKED
        self._close(LastCall.CLOSED if marker or reader.was_closed else unclosed)
        if self.is_over:
            return
        if marker not in self._ends:
            marker = yield from self._rest()
        if marker != self.call_end:
            reader.back(marker)

    def _rest(self) -> Reading[str]:
        """Reads from the end of the arguments to the end of the call: text that is there is content."""
        gap = yield from self._reader.spaces()
        yield from self._reader.option(FENCE)
        gap += yield from self._reader.spaces()

        def content(text: str) -> None:
            nonlocal gap
            self._say(gap + text)
            gap = ""

        return (yield from self._reader.until(*self._ends, passed=content))
