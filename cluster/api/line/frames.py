"""What goes over a line: frames, each a head and a piece of an event stream. Pure."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

# Ask a replica, by a request's header, for its events over a line (HEADER: the line's name and the stream's number);
# it says, by a header of its reply with the same name, that they come there.
HEADER = b"x-isotherm-line"
HEAD = struct.Struct("<IQd")  # bytes of the piece; number of the stream; seconds, as cluster/api/onward.py tells them
END = 0xFFFFFFFF  # in the place of the bytes: the stream has no more pieces
WORD = struct.Struct("<QB")  # what the proxy says: number of the stream; whether it has room for more of it
_CREDENTIALS = struct.Struct("3i")  # of who is at the other end: process, user, group


def packed(stream: int, piece: bytes, told: float) -> bytes:
    """A frame. The piece must be shorter than 4 GiB."""
    return HEAD.pack(len(piece), stream, told) + piece


def end(stream: int) -> bytes:
    return HEAD.pack(END, stream, 0.0)


class Frames:
    """Frames out of bytes as they come."""

    def __init__(self) -> None:
        self._left = b""

    def take(self, data: bytes) -> Iterator[tuple[int, bytes | None, float]]:
        """The frames that are whole now: (number of the stream, piece, seconds told); no piece where the stream ends.
        All of them must be read before more is taken."""
        data, at = (self._left + data if self._left else data), 0
        while len(data) - at >= HEAD.size:
            size, stream, told = HEAD.unpack_from(data, at)
            begin = at + HEAD.size
            if size == END:
                yield stream, None, told
                at = begin
                continue
            if len(data) - begin < size:
                break
            at = begin + size
            yield stream, data[begin:at], told
        self._left = data[at:]


def is_own_users(end: socket.socket) -> bool:
    """Whether the other end of a Unix socket is a process of this one's user: anyone on the host may connect to an
    abstract name, and take one that is free."""
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1]) == os.getuid()
