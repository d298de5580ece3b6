"""Takes the thought between `<think>` and `</think>` out of a reply, as DeepSeek-R1 and V3.1 write it.

A thought stands at the beginning of the output or nowhere. It is opened by the model, as by R1-0528, or by the prompt:
the templates of R1 and of V3.1 with thinking end with `<think>`, and then the output begins inside the thought. What
stands between the tags, and what stands after them, is given as it is, white space too; only white space before
`<think>` is left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from enum import Enum

from isotherm.cluster.text.output import LastCall, OutputFields, OutputParser

THOUGHT_BEGIN, THOUGHT_END = "<think>", "</think>"


class _At(Enum):
    BEGINNING = "beginning"  # nothing but white space has come, or a part of <think>
    THOUGHT = "thought"
    CONTENT = "content"


class ThinkParser:
    """The OutputParser of one reply to `prompt`, of which only the end counts."""

    is_over = False
    last_call = LastCall.NONE

    def __init__(self, prompt: str) -> None:
        self._at = _At.BEGINNING
        # Some models write <think> again after a prompt that ends with it: either way it is looked for first.
        self._opened = prompt.rstrip().endswith(THOUGHT_BEGIN)
        self._held = ""

    @property
    def tags(self) -> tuple[str, ...]:
        if self._at is _At.BEGINNING:
            return (THOUGHT_BEGIN, THOUGHT_END) if self._opened else (THOUGHT_BEGIN,)
        return (THOUGHT_END,) if self._at is _At.THOUGHT else ()

    @property
    def is_reasoning(self) -> bool:
        return self._at is _At.THOUGHT or (self._at is _At.BEGINNING and self._opened)

    def feed(self, text: str) -> OutputFields:
        text, self._held = self._held + text, ""
        if self._at is _At.BEGINNING:
            begun = text.lstrip()
            if begun != THOUGHT_BEGIN and THOUGHT_BEGIN.startswith(begun):  # also when nothing has come yet
                self._held = text
                return OutputFields()
            if begun.startswith(THOUGHT_BEGIN):
                self._at, text = _At.THOUGHT, begun[len(THOUGHT_BEGIN) :]
            else:
                self._at = self._after_no_tag()
        if self._at is _At.CONTENT:
            return OutputFields(text)
        thought, close, content = text.partition(THOUGHT_END)
        if close:
            self._at = _At.CONTENT
            return OutputFields(content, thought)
        kept = len(thought) - _tail_that_begins(thought, THOUGHT_END)
        self._held = thought[kept:]
        return OutputFields(reasoning=thought[:kept])

    def finish(self) -> OutputFields:
        text, self._held = self._held, ""
        if self._at is _At.BEGINNING:
            self._at = self._after_no_tag()
        return OutputFields(text) if self._at is _At.CONTENT else OutputFields(reasoning=text)

    def _after_no_tag(self) -> _At:
        return _At.THOUGHT if self._opened else _At.CONTENT


def _tail_that_begins(text: str, tag: str) -> int:
    """The length of the longest tail of `text` that `tag` begins with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class HiddenThought:
    """Another OutputParser, of whose fields the thought is left out."""

    def __init__(self, inner: OutputParser) -> None:
        self._inner = inner

    @property
    def tags(self) -> Collection[str]:
        return self._inner.tags

    @property
    def is_reasoning(self) -> bool:
        return self._inner.is_reasoning

    @property
    def is_over(self) -> bool:
        return self._inner.is_over

    @property
    def last_call(self) -> LastCall:
        return self._inner.last_call

    def feed(self, text: str) -> OutputFields:
        return replace(self._inner.feed(text), reasoning="")

    def finish(self) -> OutputFields:
        return replace(self._inner.finish(), reasoning="")
