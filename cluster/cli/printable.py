"""What others have written, as it may be printed where a terminal would take parts of it for orders. Pure."""

from __future__ import annotations

_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_UNKNOWN = {code: "\N{REPLACEMENT CHARACTER}" for code in _CONTROLS if chr(code) not in "\n\t"}


def printable(text: str, terminal: bool) -> str:
    """Without what moves a terminal's cursor, sets its title or its clipboard. A file or a pipe gets what was
    written."""
    return text.replace("\r\n", "\n").translate(_UNKNOWN) if terminal else text
