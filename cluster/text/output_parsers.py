"""The output parsers: those of a thought by name, and how one of tool calls takes what comes after it. A further format
of thoughts is a file beside this one, and an entry here; one of tool calls is a file in `tool_formats/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from isotherm.cluster.text.output import LastCall, OutputFields, OutputParser, joined
from isotherm.cluster.text.think_parser import ThinkParser
from isotherm.cluster.text.tool_formats.base import ToolParser


class PlainParser:
    """All is content."""

    tags: tuple[str, ...] = ()
    is_reasoning = False
    is_over = False
    last_call = LastCall.NONE

    def feed(self, text: str) -> OutputFields:
        return OutputFields(text)

    def finish(self) -> OutputFields:
        return OutputFields()


class ThoughtAndCalls:
    """The parser of a thought, and one of calls for the content after it. What a thought says of calls is none."""

    def __init__(self, thought: OutputParser, calls: ToolParser) -> None:
        self._thought, self._calls = thought, calls

    @property
    def tags(self) -> tuple[str, ...]:
        return (*self._thought.tags, *(() if self.is_reasoning else self._calls.tags))

    @property
    def is_reasoning(self) -> bool:
        return self._thought.is_reasoning

    @property
    def is_over(self) -> bool:
        return self._calls.is_over

    @property
    def last_call(self) -> LastCall:
        return self._calls.last_call

    def feed(self, text: str) -> OutputFields:
        return self._with_calls(self._thought.feed(text))

    def finish(self) -> OutputFields:
        return joined([self._with_calls(self._thought.finish()), self._calls.finish()])

    def _with_calls(self, fields: OutputFields) -> OutputFields:
        return replace(self._calls.feed(fields.content), reasoning=fields.reasoning) if fields.content else fields


# From the prompt as text, whose end may belong to the output (an opened thought), to the parser of one reply.
OUTPUT_PARSERS: dict[str, Callable[[str], OutputParser]] = {
    "plain": lambda prompt: PlainParser(),
    "think": ThinkParser,
}


def make_parser(name: str, prompt: str = "") -> OutputParser:
    """The parser of that name for one reply to `prompt`. Raises ValueError for a name that there is not."""
    if name not in OUTPUT_PARSERS:
        raise ValueError(f"there is no output parser {name!r}; there are {', '.join(sorted(OUTPUT_PARSERS))}")
    return OUTPUT_PARSERS[name](prompt)
