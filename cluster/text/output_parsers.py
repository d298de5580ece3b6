"""The output parsers by name. A further format is a file beside this one, and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from isotherm.cluster.text.output import OutputFields, OutputParser
from isotherm.cluster.text.think_parser import ThinkParser


class PlainParser:
    """All is content."""

    tags: tuple[str, ...] = ()
    is_reasoning = False

    def feed(self, text: str) -> OutputFields:
        return OutputFields(text)

    def finish(self) -> OutputFields:
        return OutputFields()


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
