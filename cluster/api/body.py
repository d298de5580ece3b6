"""The body of a request: its type, and how large it may be, counted while it comes in and while it is decoded."""

from __future__ import annotations

import asyncio
from email.message import Message as MailMessage
from functools import lru_cache

from starlette.requests import Request

from isotherm.cluster.api.coding import ALLOWED, CODINGS, decoded, too_large
from isotherm.cluster.api.errors import ReplyError

_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
_BOM = b"\xef\xbb\xbf"
# A coded body up to this size is decoded in well under a millisecond, unless it is a bomb: no thread.
_INLINE_BYTES = 16 * 1024


async def read_body(request: Request, limit: int, json_only: bool = True) -> bytes:
    """The decoded body, without a byte order mark. Raises ReplyError 413 above `limit` bytes, as sent or decoded, 415
    for a coding, a charset or (with `json_only`) a content type that is not taken, 400 for a coded body that is
    damaged."""
    if json_only:
        _check_content_type(request.headers.get("content-type", "application/json"))
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity", *CODINGS):
        message = (
            f"content-encoding: {coding[:100]!r} is not taken; send {ALLOWED.replace(', identity', ' or identity')}"
        )
        raise ReplyError(message, status=415, param="content-encoding", headers={"accept-encoding": ALLOWED})
    body = await _received(request, limit)
    if coding in CODINGS:
        inline = len(body) <= _INLINE_BYTES
        body = decoded(body, coding, limit) if inline else await asyncio.to_thread(decoded, body, coding, limit)
    return body.removeprefix(_BOM)


@lru_cache(maxsize=64)
def _kind_and_charset(content_type: str) -> tuple[str, str]:
    header = MailMessage()
    header["content-type"] = content_type
    kind = content_type.partition(";")[0].strip().lower()
    return kind, str(header.get_param("charset", "utf-8")).lower()


def _check_content_type(value: str) -> None:
    kind, charset = _kind_and_charset(value)
    if kind != "application/json" and not kind.endswith("+json"):
        raise ReplyError(
            f"content-type: expected application/json, got {kind[:100]!r}", status=415, param="content-type"
        )
    if charset not in _CHARSETS:
        raise ReplyError(
            f"content-type: JSON is taken in UTF-8, not in charset {charset[:100]!r}", status=415, param="content-type"
        )


async def _received(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large(limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large(limit)
        parts.append(part)
    return b"".join(parts)
