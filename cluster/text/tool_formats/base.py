"""What a format of tool calls is, and what the parsers of all of them share: ids, the white space around calls, and
the pieces of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.output import LastCall, OutputFields, ToolCallPiece
from isotherm.cluster.text.tool_formats.reader import Reader, Reading

if TYPE_CHECKING:
    from isotherm.cluster.text.tool_formats.grammar import Literals


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of the object that its arguments are; `strict`:
    a call of it fits that schema in any case."""

    name: str
    parameters: JSON = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True)
class Offer:
    """The tools of one request, whether a reply may call several, and the ids of its calls: `new_id` makes one from the
    call's index in the reply, the same at every time."""

    tools: Sequence[Tool]
    new_id: Callable[[int], str]
    parallel: bool = True

    def parameters(self, name: str) -> JSON:
        """The schema of a tool's arguments; an empty one for a tool that is not offered."""
        return next((tool.parameters for tool in self.tools if tool.name == name), {})

    def offers(self, name: str) -> bool:
        return any(tool.name == name for tool in self.tools)


class ToolParser(ABC):
    """The OutputParser of one format: takes calls out of content that has no thought any more.

    Text around calls is content. White space before the first and after the last of some calls counts as content where
    text follows them, and else belongs to them, as what is between them does. A call of a tool that is not offered is a
    call: who offered the tools can tell the model so. Arguments come piece by piece, as JSON text; what a model wrote
    as broken JSON stays as it wrote it. A call without arguments has `{}`. Where the offer is not parallel, the output
    is over with the first call."""

    is_reasoning = False
    begins: ClassVar[tuple[str, ...]]  # markers in content by which calls begin
    inner: ClassVar[tuple[str, ...]] = ()  # tags that mean something from there on

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._reader = Reader()
        self._in_calls = False
        self._content: list[str] = []
        self._pieces: dict[int, ToolCallPiece] = {}
        self._spaces = ""  # at the end of the content so far
        self._after_call = False  # there was a call since the last text
        self._lead = ""  # of the spaces, those that stood before the first of the calls
        self._count = 0
        self._argued = False  # the last call has a text of arguments
        self._over = False
        self._last_call = LastCall.NONE
        self._reading = self._read()
        next(self._reading)

    @property
    def tags(self) -> Collection[str]:
        return () if self._over else (*self.begins, *self.inner) if self._in_calls else self.begins

    @property
    def is_over(self) -> bool:
        return self._over

    @property
    def last_call(self) -> LastCall:
        return self._last_call

    def feed(self, text: str) -> OutputFields:
        if not self._over:
            self._reader.put(text)
            next(self._reading, None)
        return self._taken()

    def finish(self) -> OutputFields:
        if not self._over:
            self._reader.ended = True
            next(self._reading, None)
            if self._spaces and not self._after_call:
                self._content.append(self._spaces)
        return self._taken()

    def _taken(self) -> OutputFields:
        fields = OutputFields("".join(self._content), tool_calls=tuple(self._pieces.values()))
        self._content.clear()
        self._pieces.clear()
        return fields

    def _read(self) -> Reading[None]:
        """Reads the whole output."""
        yield  # for the constructor: nothing has come yet
        while not self._over:
            marker = yield from self._reader.until(
                *(dict.fromkeys((*self.begins, *self.inner)) if self._in_calls else self.begins), passed=self._say
            )
            if not marker:
                return
            if not (self._in_calls or self._after_call):
                self._lead = self._spaces
            yield from self._marked(marker)
            if self._after_call:
                self._spaces = self._lead  # those within a call and between calls are none of the text's

    @abstractmethod
    def _marked(self, marker: str) -> Reading[None]:
        """Reads what comes after a marker that stood where text or a call may be."""

    def _say(self, text: str) -> None:
        """Adds content."""
        text = self._spaces + text
        said = text.rstrip()
        self._spaces = text[len(said) :]
        if said:
            self._after_call, self._lead = False, ""
            self._content.append(said)

    def _open(self, name: str, call_id: str = "") -> None:
        """Begins a call."""
        self._after_call = True
        self._argued = False
        self._last_call = LastCall.OPEN
        self._add(ToolCallPiece(self._count, call_id or self._offer.new_id(self._count), name))
        self._count += 1

    def _argue(self, arguments: str) -> None:
        """Adds to the arguments of the call that was begun last."""
        if arguments:
            self._argued = True
            self._add(ToolCallPiece(self._count - 1, arguments=arguments))

    def _close(self, last_call: LastCall) -> None:
        """The end of the call that was begun last, and how far that has come."""
        if not self._argued:
            self._argue("{}")
        self._last_call = last_call
        self._over = not self._offer.parallel

    def _add(self, piece: ToolCallPiece) -> None:
        before = self._pieces.get(piece.index)
        if before is not None:
            piece = ToolCallPiece(piece.index, before.id, before.name, before.arguments + piece.arguments)
        self._pieces[piece.index] = piece


class ToolFormat(ABC):
    """A format of tool calls. `opening` is what the first call of an output begins with, and nothing else does;
    `lead` the white space that models write before it, after a text."""

    name: ClassVar[str]
    opening: ClassVar[str]
    lead: ClassVar[str] = ""

    @abstractmethod
    def shown_by(self, template: str) -> bool:
        """Whether a chat template of this text writes calls of earlier turns in this format."""

    @abstractmethod
    def parser(self, offer: Offer) -> ToolParser:
        """The parser of one reply."""

    @abstractmethod
    def rules(self, tools: Sequence[Tool], written: Literals, *, parallel: bool) -> list[str]:
        """Rules of a llguidance Lark grammar. The first is `calls`: what comes after the opening, one call of one of
        the tools, and where it is `parallel` further ones. Raises ToolSchemaError for a schema that cannot be
        enforced in this format."""
