"""Coded bodies: what is taken, and that a small one never becomes a large one."""

from __future__ import annotations

import gzip
import time
import tracemalloc
import zlib

import pytest

from isotherm.cluster.api.coding import CODINGS, decoded, zstd
from isotherm.cluster.api.errors import ReplyError

LIMIT = 1 << 20
TEXT = b"naive text " * 5000


def raw_deflate(data):
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def unsized(data, window_log=None):
    """zstd as a stream writes it, without a size in its head."""
    options = {} if window_log is None else {zstd.CompressionParameter.window_log: window_log}
    stream = zstd.ZstdCompressor(options=options)
    return stream.compress(data) + stream.flush()


CODED = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # a frame of zstd that holds nothing


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_one_frame_and_several(coding):
    code = CODED[coding]
    assert decoded(code(TEXT), coding, LIMIT) == TEXT
    assert decoded(code(TEXT[:7]) + code(b"") + code(TEXT[7:]), coding, LIMIT) == TEXT
    assert decoded(b"", coding, LIMIT) == b"" == decoded(code(b""), coding, LIMIT)
    assert decoded(code(TEXT), coding, len(TEXT)) == TEXT


def test_other_forms():
    assert decoded(raw_deflate(TEXT), "deflate", LIMIT) == TEXT
    assert decoded(unsized(TEXT) + SKIPPABLE + unsized(TEXT), "zstd", LIMIT) == TEXT * 2


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_a_bomb_costs_no_more_than_the_limit(coding):
    code = CODED[coding]
    for bomb in (code(b"\0" * (64 << 20)), code(b"\0" * LIMIT) * 3):
        tracemalloc.start()
        with pytest.raises(ReplyError) as info:
            decoded(bomb, coding, LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert info.value.status == 413 and peak < 4 * LIMIT


def test_a_window_is_bounded():
    assert decoded(unsized(TEXT, 23), "zstd", LIMIT) == TEXT
    with pytest.raises(ReplyError, match="memory") as info:
        decoded(unsized(TEXT, 27), "zstd", LIMIT)
    assert info.value.status == 400


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_frames_are_bounded(coding):
    many = CODED[coding](b"") * 100_000
    begin = time.monotonic()
    with pytest.raises(ReplyError, match="frames"):
        decoded(many, coding, LIMIT)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("coding", sorted(CODINGS))
def test_damage_is_said(coding):
    whole = CODED[coding](TEXT)
    for bad in (whole[:-5], b"plain text", whole + b"more", whole[:20] + b"\xff" * 20 + whole[40:]):
        with pytest.raises(ReplyError, match="cannot be decoded") as info:
            decoded(bad, coding, LIMIT)
        assert (info.value.status, info.value.param) == (400, "content-encoding")
