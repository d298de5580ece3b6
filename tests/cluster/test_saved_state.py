"""What a controller writes down comes back as it was, and small."""

from __future__ import annotations

import random
import zlib

import pytest

from isotherm.cluster.operations import OperationLog
from isotherm.cluster.placement import Placement, contiguous_placement
from isotherm.cluster.saved_state import SavedState, decode


def state(placement: Placement) -> SavedState:
    numbers, pinned = {"expert": 9, "attention": 8}, ((3, 1), (4, 255))
    logs = OperationLog().dump(), '{"decisions": []}', '[{"weights": "0123"}]'
    return SavedState(placement.groups(), ("attention-0", "attention-7"), placement, ("a1b2",), pinned, numbers, *logs)


def test_round_trip():
    holders = ((("expert-0",), ("expert-2", "expert-8")), (("expert-8",), ("expert-0",)))
    saved = state(Placement(12, (1, 3), holders))
    assert decode(saved.encode()) == saved
    empty = state(Placement(0, (), ()))
    assert decode(empty.encode()) == empty


def test_a_large_placement_is_small():
    rng = random.Random(1)
    groups = [f"expert-{i}" for i in range(144)]
    plain = contiguous_placement(range(3, 61), 256, groups)
    holders = tuple(tuple(tuple(sorted({*held, rng.choice(groups)})) for held in experts) for experts in plain.holders)
    saved = state(Placement(40, plain.layers, holders))
    assert len(saved.encode()) < 64 << 10 and decode(saved.encode()) == saved


@pytest.mark.parametrize("data", [b"", b"{}", zlib.compress(b"not json"), zlib.compress(b'{"format": 99}')])
def test_other_data_is_refused(data: bytes):
    with pytest.raises(ValueError):
        decode(data)
