"""Bodies as real clients send them: coded, with a byte order mark or a charset, too large once they are decoded."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import pytest
from starlette.requests import Request

from isotherm.cluster.api.body import read_body
from isotherm.cluster.api.errors import ReplyError

LIMIT = 100_000
BODY = json.dumps({"prompt": "naïve " * 400}, ensure_ascii=False).encode()


def read(body, limit=LIMIT, json_only=True, **headers):
    parts = [body[i : i + 30_000] for i in range(0, len(body), 30_000)] or [b""]

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return asyncio.run(read_body(Request({"type": "http", "headers": raw}, receive), limit, json_only))


def refused(body, **headers):
    with pytest.raises(ReplyError) as info:
        read(body, **headers)
    return info.value


def raw_deflate(data):
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def gzipped(data: bytes) -> bytes:
    """The same at any time: tests that run in several processes are to have one name in all of them."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzipped(BODY)),
        ("X-GZIP", gzipped(BODY)),
        ("gzip", gzipped(BODY[:50]) + gzipped(BODY[50:])),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
        ("gzip", gzipped(b"")),
        ("gzip", b""),
    ],
)
def test_codings_that_are_taken(coding, body):
    assert read(body, content_encoding=coding) == (BODY if len(body) > 40 else b"")


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "compress", "zstandard"])
def test_other_codings_are_refused_by_name(coding):
    error = refused(BODY, content_encoding=coding)
    assert (error.status, error.param) == (
        415,
        "content-encoding",
    ) and "gzip, deflate, zstd or identity" in error.message
    assert error.headers == {"accept-encoding": "gzip, deflate, zstd, identity"}


@pytest.mark.parametrize("body", [BODY, gzipped(BODY)[:-9], gzipped(BODY) + b"junk", b"\x1f\x8b"])
def test_a_damaged_coded_body_is_a_400(body):
    error = refused(body, content_encoding="gzip")
    assert (error.status, error.param) == (400, "content-encoding")


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, zlib.compress, raw_deflate, lambda data: gzip.compress(data[:LIMIT]) + gzip.compress(data[LIMIT:])],
)
def test_a_bomb_is_not_blown_up(pack):
    bomb = pack(b" " * (50 << 20))
    assert len(bomb) < LIMIT
    error = refused(bomb, content_encoding="gzip" if bomb[0] == 0x1F else "deflate")
    assert (error.status, error.code) == (413, "request_too_large")
    assert read(pack(b" " * LIMIT), content_encoding="deflate") == b" " * LIMIT


def test_sent_sizes_are_bounded_too():
    assert refused(b"x" * (LIMIT + 1)).status == 413
    assert refused(b"", content_length=str(LIMIT + 1)).status == 413


def test_a_byte_order_mark_is_taken_off():
    assert read(b"\xef\xbb\xbf{}") == b"{}" == read(gzip.compress(b"\xef\xbb\xbf{}"), content_encoding="gzip")


@pytest.mark.parametrize(
    ("kind", "ok"),
    [
        ("application/json; charset=utf-8", True),
        ('application/json; charset="UTF8"', True),
        ("application/vnd.api+json", True),
        ("application/json; charset=utf-16", False),
        ("application/json;charset=iso-8859-1", False),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
    ],
)
def test_content_types(kind, ok):
    if ok:
        assert read(b"{}", content_type=kind) == b"{}"
    else:
        error = refused(b"{}", content_type=kind)
        assert (error.status, error.param) == (415, "content-type")
    assert read(b"{}", json_only=False, content_type=kind) == b"{}"
