"""The parts of a reply in the order in which they come, one after another: thoughts, texts, tool calls. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from isotherm.cluster.text.output import OutputFields, ToolCallPiece


class PartKind(Enum):
    THOUGHT = "thought"
    TEXT = "text"
    CALL = "call"


@dataclass
class Part:
    """What has come of one part. `call_id` and `name` are a call's."""

    index: int
    kind: PartKind
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The thought or the text; a call's arguments."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Step:
    """What happens to a part: it begins, `text` is added to it, or it ends."""

    part: Part
    what: Literal["begins", "grows", "ends"]
    text: str = ""


class Parts:
    """Takes a choice's fields as they come. A part ends when another begins: in a stream nothing is open but the last
    one, and a whole reply has the same parts as a stream.

    White space that begins a text is held back till more of the text comes: between a thought and a call there is
    mostly some, and clients would take it for an answer."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._open: Part | None = None
        self._calls: dict[int, Part] = {}  # by the call's index
        self._held = ""

    def feed(self, fields: OutputFields) -> list[Step]:
        steps: list[Step] = []
        begun = frozenset(self._calls)
        if fields.reasoning:
            steps += self._add(PartKind.THOUGHT, fields.reasoning)
        # What a call that has begun still gets came before the text after it; a call that begins came after the text.
        for piece in fields.tool_calls:
            if piece.index in begun:
                steps += self._add_to_call(piece)
        if fields.content:
            steps += self._add_text(fields.content)
        for piece in fields.tool_calls:
            if piece.index not in begun:
                steps += self._add_to_call(piece)
        return steps

    def finish(self) -> list[Step]:
        """The end of the reply. White space that is all that there is to say is said."""
        silent = all(part.kind is PartKind.THOUGHT for part in self.all)
        steps = self._add(PartKind.TEXT, self._held) if self._held and silent else []
        self._held = ""
        return steps + self._end()

    def _add_text(self, text: str) -> list[Step]:
        text, self._held = self._held + text, ""
        in_text = self._open is not None and self._open.kind is PartKind.TEXT
        if not in_text and text.isspace():
            self._held = text
            return []
        return self._add(PartKind.TEXT, text)

    def _add(self, kind: PartKind, text: str) -> list[Step]:
        steps = []
        if self._open is None or self._open.kind is not kind:
            steps = self._begin(Part(len(self.all), kind))
        return [*steps, self._grow(self.all[-1], text)]

    def _add_to_call(self, piece: ToolCallPiece) -> list[Step]:
        steps = []
        if (part := self._calls.get(piece.index)) is None:
            part = self._calls[piece.index] = Part(len(self.all), PartKind.CALL, piece.id, piece.name)
            self._held = ""
            steps = self._begin(part)
        return [*steps, self._grow(part, piece.arguments)] if piece.arguments else steps

    def _begin(self, part: Part) -> list[Step]:
        steps = [*self._end(), Step(part, "begins")]
        self._open = part
        self.all.append(part)
        return steps

    @staticmethod
    def _grow(part: Part, text: str) -> Step:
        part.pieces.append(text)
        return Step(part, "grows", text)

    def _end(self) -> list[Step]:
        part, self._open = self._open, None
        return [] if part is None else [Step(part, "ends")]
