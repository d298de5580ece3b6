"""What a body may be coded in, and decoding it: never more is made of it than is allowed."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable
from typing import Protocol

from isotherm.cluster.api.errors import ReplyError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW_LOG = 23  # 8 MiB: the largest window that HTTP's zstd may ask for (RFC 9659)
_PIECE = 64 * 1024
_MAX_FRAMES = 4096  # of one body: each costs something, even an empty one


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _gzip_or_zlib() -> _Decoder:
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: by its header, gzip or zlib


def _raw_deflate() -> _Decoder:
    return zlib.decompressobj(-zlib.MAX_WBITS)


def _zstd() -> _Decoder:
    decoder: _Decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
    return decoder


CODINGS: dict[str, Callable[[], _Decoder]] = {
    "gzip": _gzip_or_zlib,
    "x-gzip": _gzip_or_zlib,
    "deflate": _gzip_or_zlib,
    "zstd": _zstd,
}
ALLOWED = "gzip, deflate, zstd, identity"


def decoded(body: bytes, coding: str, limit: int) -> bytes:
    """A stream in one of CODINGS, or several in a row; never more than `limit` bytes are made of it. Raises ReplyError
    413 and 400."""
    try:
        return _decoded(body, CODINGS[coding], limit)
    except (zlib.error, zstd.ZstdError) as error:
        if coding == "deflate":  # without zlib's header, as some clients send it
            with contextlib.suppress(zlib.error):
                return _decoded(body, _raw_deflate, limit)
        raise ReplyError(f"the body cannot be decoded: {error}", param="content-encoding") from None


def _decoded(body: bytes, new: Callable[[], _Decoder], limit: int) -> bytes:
    parts: list[bytes] = []
    at, room, frames = 0, limit, 0
    while at < len(body):
        frames += 1
        if frames > _MAX_FRAMES:
            raise zlib.error(f"it has more than {_MAX_FRAMES} frames")
        decoder = new()
        while not decoder.eof:
            if not (piece := body[at : at + _PIECE]):
                raise zlib.error("it is cut off")
            part = decoder.decompress(piece, room + 1)
            room -= len(part)
            if room < 0:
                raise too_large(limit, "decoded, ")
            at += len(piece)
            parts.append(part)
        at -= len(decoder.unused_data)
    return b"".join(parts)


def too_large(limit: int, how: str = "") -> ReplyError:
    # The rest of the body will not be read, so the connection cannot be used again.
    return ReplyError(
        f"{how}the body is larger than {limit} bytes",
        status=413,
        code="request_too_large",
        headers={"connection": "close"},
    )
