"""What two groups say to each other while one copies experts from the other: a greeting, then for each expert a
question, and its form, its bytes and their checksum."""

from __future__ import annotations

import socket
import struct

GREETING = struct.Struct("<8s16s")  # MAGIC, the offer's key
MAGIC = b"isocopy1"
QUESTION = struct.Struct("<ii")  # layer, expert
ANSWER = struct.Struct("<iI")  # HELD or NOT_HELD, bytes of the form that follows as JSON
HELD, NOT_HELD = 1, 0
CHECKSUM = struct.Struct("<I")  # CRC-32 of the form and of all bytes of the parts, which it follows
CHUNK = 256 << 10  # bytes at once: as many as stay in a core's cache between checksum and copy
MOST_FORM = 4096  # bytes


def unix_address(name: str) -> bytes:
    return b"\0" + name.encode()


def widen(connection: socket.socket) -> None:
    """Room for some chunks in the system's buffers, so that both ends work at once."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, 4 * CHUNK)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
