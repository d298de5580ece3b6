"""Reads text that comes in pieces as if it were all there: a read that needs more than has come waits for it.

A parser is a generator over a `Reader`: each read is `yield from`, and the generator is resumed when there is more
text. What a read gives is decided by the text alone, never by where it was cut: nothing is decided while what is still
to come could decide it otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]


class Reader:
    """The text that was put in and not read yet. `ended`: there will be no more. `was_closed`: what `json_value` read
    last came to its closing bracket."""

    def __init__(self) -> None:
        self._text = ""
        self.ended = self.was_closed = False

    @property
    def is_done(self) -> bool:
        return self.ended and not self._text

    def put(self, text: str) -> None:
        self._text += text

    def back(self, text: str) -> None:
        """Puts back what was read last."""
        self._text = text + self._text

    def until(self, *markers: str, passed: Callable[[str], object]) -> Reading[str]:
        """Reads up to the first of the markers and over it, and gives it; "" where the text ends before. What comes
        before goes to `passed` as soon as it is certain. No marker may begin with another one."""
        while True:
            at, marker = self._first(markers)
            if at:
                passed(self._text[:at])
            self._text = self._text[at + len(marker) :]
            if marker or self.ended:
                return marker
            yield

    def take_until(self, *markers: str) -> Reading[tuple[str, str]]:
        """As `until`; gives what came before the marker, and the marker."""
        parts: list[str] = []
        marker = yield from self.until(*markers, passed=parts.append)
        return "".join(parts), marker

    def spaces(self) -> Reading[str]:
        """Reads over white space, to something else or to the end."""
        taken = ""
        while True:
            rest = self._text.lstrip()
            taken, self._text = taken + self._text[: len(self._text) - len(rest)], rest
            if rest or self.ended:
                return taken
            yield

    def option(self, *options: str) -> Reading[str]:
        """Reads over the option that the text goes on with; "" where it is none. No option may begin with another."""
        while True:
            for option in options:
                if self._text.startswith(option):
                    self._text = self._text[len(option) :]
                    return option
            if self.ended or not any(option.startswith(self._text) for option in options):
                return ""
            yield

    def string(self) -> Reading[tuple[str, bool]]:
        """Reads the rest of a JSON string, after its first quote: as it stands, and whether its last quote was there
        (it is read too)."""
        taken = ""
        while True:
            text, mark = yield from self.take_until('"', "\\")
            taken += text
            if mark != "\\":
                return taken, bool(mark)
            while not self._text and not self.ended:
                yield
            taken += mark + self._text[:1]
            self._text = self._text[1:]

    def json_value(self, *ends: str, passed: Callable[[str], object]) -> Reading[str]:
        """Reads an object or an array, which goes to `passed` as it comes: gives "" when it is closed, or the text has
        ended; or the one of the `ends` that came before. What is neither object nor array reaches up to an end. Inside
        of a string an end is a part of it, unless it stands before another end, a line end, which no string can have,
        or the end of the text: then the string has lost its quote."""
        closing = _Closing()
        while True:
            at, marker = self._first(ends)
            closed = closing.after(self._text[:at])
            self.was_closed = closed is not None
            part = False  # of a string
            if marker and closed is None and closing.in_string:
                followed = self._is_followed(at + len(marker), ("\n", *ends))
                if followed is None:
                    marker = ""  # for now
                elif not followed:
                    closing.after(marker)
                    at, part = at + len(marker), True
            taken = at if closed is None else closed
            if taken:
                passed(self._text[:taken])
            self._text = self._text[taken:]
            if closed is not None:
                return ""
            if part:
                continue
            if marker or self.ended:
                self._text = self._text[len(marker) :]
                return marker
            yield

    def _is_followed(self, at: int, options: tuple[str, ...]) -> bool | None:
        """Whether one of the options, or the end of the text, stands there; None while that is not certain."""
        rest = self._text[at:]
        if any(rest.startswith(option) for option in options):
            return True
        if self.ended:
            return not rest
        return None if any(option.startswith(rest) for option in options) else False

    def _first(self, markers: tuple[str, ...]) -> tuple[int, str]:
        """Where the first marker begins, and it; without one, up to where none can begin any more, and ""."""
        found = _any_of(markers).search(self._text)
        if self.ended:
            return (len(self._text), "") if found is None else (found.start(), found[0])
        held = len(self._text) - max(_overlap(self._text, marker) for marker in markers)
        if found is None or held < found.start():
            return held, ""
        return found.start(), found[0]


class _Closing:
    """Watches JSON text for the end of its first object or array."""

    def __init__(self) -> None:
        self.in_string = False
        self._escaped = False
        self._depth = 0
        self._bare = False  # it is neither object nor array

    def after(self, text: str) -> int | None:
        """Takes further text: how much of it there is up to the end, where that is in it."""
        for at, char in enumerate(text):
            if self._bare:
                return None
            if self.in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self.in_string = False
            elif char in "{[":
                self._depth += 1
            elif self._depth == 0:
                self._bare = not char.isspace()
            elif char == '"':
                self.in_string = True
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


@cache
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


def _overlap(text: str, marker: str) -> int:
    """The length of the longest tail of `text` that `marker` begins with, and goes on after."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
