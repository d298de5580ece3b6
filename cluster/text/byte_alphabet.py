"""The characters by which byte-level vocabularies write bytes: GPT-2's printable stand-ins."""

from __future__ import annotations

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_OF: dict[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
BYTE_CHARS: dict[int, str] = {byte: char for char, byte in BYTE_OF.items()}
