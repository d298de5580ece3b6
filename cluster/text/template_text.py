"""A string that remembers which of its characters the template itself wrote, whatever a template does to it.

What is not known to be the template's counts as the client's, so that an operation which is not followed here (a
format, a filter in C) can take a marker's meaning away, and never give one. Imports only the standard library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, SupportsIndex

_OWN_RUN = re.compile(rb"\x01+")


class TemplateText(str):
    """Text of which `_own` has a byte for each character: 1 where the template wrote it, 0 where the client did. Made
    directly it is the client's; `written` makes the template's. The underscore keeps templates away: jinja2's sandbox
    lets no such attribute through."""

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, text: object = "") -> TemplateText:
        value = str(text)
        return _made(value, own_mask(value))

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return _made(str.__add__(self, other), self._own + own_mask(other))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return _made(str.__add__(other, self), own_mask(other) + self._own)

    def __mul__(self, count: SupportsIndex) -> TemplateText:
        return _made(str.__mul__(self, count), self._own * count)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> TemplateText:
        text = str.__getitem__(self, key)
        return _made(text, self._own[key] if isinstance(key, slice) else bytes([self._own[key]]))

    def join(self, parts: Iterable[str]) -> TemplateText:
        parts = list(parts)
        return _made(str.join(self, parts), self._own.join(map(own_mask, parts)))

    def strip(self, chars: str | None = None) -> TemplateText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> TemplateText:
        text = str.lstrip(self, chars)
        return _made(text, self._own[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None) -> TemplateText:
        text = str.rstrip(self, chars)
        return _made(text, self._own[: len(text)])

    def removeprefix(self, prefix: str) -> TemplateText:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> TemplateText:
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._cut(str.split(self, sep, maxsplit), sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._cut(str.rsplit(self, sep, maxsplit), sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._cut(str.splitlines(self, keepends=True), "")
        return [line[: len(text)] for line, text in zip(whole, str.splitlines(self, keepends), strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        return self._parted(self.find(sep), sep) or (self, "", "")

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return self._parted(self.rfind(sep), sep) or ("", "", self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:
            return str.replace(self, old, new, count)
        return _made(str(new), own_mask(new)).join(self.split(old, count))

    def upper(self) -> str:
        return self._recased(str.upper(self))

    def lower(self) -> str:
        return self._recased(str.lower(self))

    def title(self) -> str:
        return self._recased(str.title(self))

    def capitalize(self) -> str:
        return self._recased(str.capitalize(self))

    def _recased(self, text: str) -> str:
        return _made(text, self._own) if len(text) == len(self) else text

    def _cut(self, parts: list[str], sep: str | None) -> Iterable[TemplateText]:
        """The parts that a split gave, each with its own mask. They stand in this order, with nothing but separators
        between them."""
        at = 0
        for part in parts:
            if sep is None:  # any white space
                at = self.find(part, at)
            yield self[at : at + len(part)]
            at += len(part) + len(sep or "")

    def _parted(self, at: int, sep: str) -> tuple[str, str, str] | None:
        return None if at < 0 else (self[:at], self[at : at + len(sep)], self[at + len(sep) :])


def written(text: str) -> TemplateText:
    """Text that the template wrote, all of it."""
    return _made(text, b"\x01" * len(text))


def own_mask(text: str) -> bytes:
    """A byte for each character: 1 where the template wrote it."""
    return text._own if isinstance(text, TemplateText) else bytes(len(text))


def own_runs(parts: Iterable[str]) -> list[int]:
    """Where in the joined parts the template's own text begins and ends: [begin, end, begin, end, …]."""
    runs: list[int] = []
    offset = 0
    for part in parts:
        for run in _OWN_RUN.finditer(own_mask(part)):
            begin, end = offset + run.start(), offset + run.end()
            if runs and runs[-1] == begin:
                runs[-1] = end
            else:
                runs += (begin, end)
        offset += len(part)
    return runs


def joined(parts: Iterable[str]) -> TemplateText:
    """What `"".join` is to plain strings."""
    return _EMPTY.join(parts)


def _made(text: str, own: bytes) -> TemplateText:
    made = str.__new__(TemplateText, text)
    made._own = own
    return made


_EMPTY = written("")
