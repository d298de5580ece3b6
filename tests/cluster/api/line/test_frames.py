"""Frames of a line, cut anywhere."""

from __future__ import annotations

import pytest

from isotherm.cluster.api.line.frames import Frames, end, packed

SENT = packed(7, b"data: a\n\n", 0.5) + end(8) + packed(9, b"", 1.5) + packed(7, b"b" * 300, 2.0) + end(7)
WHOLE = [(7, b"data: a\n\n", 0.5), (8, None, 0.0), (9, b"", 1.5), (7, b"b" * 300, 2.0), (7, None, 0.0)]


@pytest.mark.parametrize("size", [1, 3, 20, 21, 64, len(SENT)])
def test_frames_come_out_as_they_were_sent_however_the_bytes_are_cut(size):
    frames = Frames()
    taken = [frame for at in range(0, len(SENT), size) for frame in frames.take(SENT[at : at + size])]
    assert taken == WHOLE


def test_a_frame_is_not_given_before_it_is_whole():
    frames = Frames()
    assert list(frames.take(SENT[:28])) == []
    assert list(frames.take(SENT[28:29])) == WHOLE[:1]
