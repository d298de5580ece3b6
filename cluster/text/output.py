"""What a model's output consists of (content, reasoning, tool calls), and what a parser is that tells them apart as the
text comes.

Knows nothing about tokens or HTTP."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol


class LastCall(Enum):
    """How far the last tool call of a text has come."""

    NONE = "none"  # there is none
    OPEN = "open"  # its arguments are not all there
    UNMARKED = "unmarked"  # its arguments may be all there, but what marks its end is missing
    CLOSED = "closed"


@dataclass(frozen=True)
class ToolCallPiece:
    """What is added to the index-th tool call of a choice: its id and name in its first piece, and then more of its
    arguments (JSON as text)."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class OutputFields:
    """A piece of output by field. In a piece that has several, reasoning comes before content, and content before tool
    calls."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallPiece, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.tool_calls)


class OutputParser(Protocol):
    """Splits the text of one reply into fields. What all pieces amount to (`joined`) does not depend on how the text is
    cut into calls of `feed`. Whatever the text, nothing is raised: what is not understood is content."""

    @property
    def tags(self) -> Collection[str]:
        """The tags that may come next and mean something: a token that is one of them is shown to the parser also where
        special tokens are left out of the text. While there are any, the parser is fed token by token, since one may
        change them."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the text up to here ends inside a thought."""

    @property
    def is_over(self) -> bool:
        """Whether nothing that may still come counts, as after a stop string."""

    @property
    def last_call(self) -> LastCall:
        """Of the calls so far; after `finish` of all."""

    def feed(self, text: str) -> OutputFields:
        """Takes further text, and gives what can't change any more."""

    def finish(self) -> OutputFields:
        """The end of the text: what was held back. Nothing is fed after it."""


def joined(pieces: Iterable[OutputFields]) -> OutputFields:
    """All pieces as one, each tool call whole."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCallPiece] = {}
    for piece in pieces:
        content.append(piece.content)
        reasoning.append(piece.reasoning)
        for call in piece.tool_calls:
            before = calls.get(call.index, ToolCallPiece(call.index))
            calls[call.index] = replace(
                before,
                id=before.id or call.id,
                name=before.name or call.name,
                arguments=before.arguments + call.arguments,
            )
    return OutputFields("".join(content), "".join(reasoning), tuple(calls[index] for index in sorted(calls)))
