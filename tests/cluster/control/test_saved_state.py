"""What a controller writes down comes back as it was, and small."""

from __future__ import annotations

import json
import random
import zlib
from functools import reduce

import pytest

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.saved_state import SavedRevision, SavedState, decode
from isotherm.cluster.messages.operations import OperationLog
from isotherm.cluster.placement.table import Placement, contiguous_placement


def revision(placement: Placement, number: int = 0) -> SavedRevision:
    shards, pinned = ("attention-0", "attention-7"), frozenset({(3, 1), (4, 255)})
    desired = Desired(placement.groups(), shards, placement, frozenset({"a1b2"}), pinned)
    return SavedRevision(number, f"/models/{number}", desired, '[{"weights": "0123"}]', f'{{"dtype": "{number}"}}')


def state(placement: Placement, leaving: SavedRevision | None = None) -> SavedState:
    logs = OperationLog().dump(), '{"decisions": []}', '{"model": "tiny"}'
    return SavedState(revision(placement, 3), leaving, {"expert": 9, "attention": 8}, *logs)


def test_round_trip():
    holders = ((("expert-0",), ("expert-2", "expert-8")), (("expert-8",), ("expert-0",)))
    saved = state(Placement(12, (1, 3), holders))
    assert decode(saved.encode()) == saved
    rolled = state(saved.serving.desired.placement, leaving=revision(Placement(9, (1, 3), holders), 2))
    assert decode(rolled.encode()) == rolled and rolled.leaving is not None
    assert rolled.leaving.workers == ("expert-0", "expert-2", "expert-8", "attention-0", "attention-7")
    empty = state(Placement(0, (), ()))
    assert decode(empty.encode()) == empty


def test_a_large_placement_is_small():
    rng = random.Random(1)
    groups = [f"expert-{i}" for i in range(144)]
    plain = contiguous_placement(range(3, 61), 256, groups)
    holders = tuple(tuple(tuple(sorted({*held, rng.choice(groups)})) for held in experts) for experts in plain.holders)
    saved = state(Placement(40, plain.layers, holders))
    assert len(saved.encode()) < 64 << 10 and decode(saved.encode()) == saved


@pytest.mark.parametrize(
    "data", [b"", b"{}", zlib.compress(b"not json"), zlib.compress(b'{"format": 99}'), zlib.compress(b"5")]
)
def test_other_data_is_refused(data: bytes):
    with pytest.raises(ValueError, match="the saved state"):
        decode(data)


PARTS = ["format", "leaving", "numbers", "autoscaler", "serving", "serving.groups", "serving.placement.holders"]


@pytest.mark.parametrize("value", ["nothing", None, 7, [[[9]]]])
@pytest.mark.parametrize("path", PARTS)
def test_a_state_that_lacks_a_part_or_has_one_of_another_kind_is_refused(path: str, value: object):
    """It was a KeyError or a TypeError, or came to light somewhere else."""
    if (path, value) == ("leaving", None):
        return  # as it should be
    *above, last = path.split(".")
    whole = json.loads(zlib.decompress(state(contiguous_placement((1, 2), 4, ["expert-0"])).encode()))
    part = reduce(lambda inner, name: inner[name], above, whole)
    part[last] = value
    if value == "nothing":
        del part[last]
    with pytest.raises(ValueError, match="the saved state"):
        decode(zlib.compress(json.dumps(whole).encode()))
