"""Whose the folder's bytes are: nobody takes the room of others, and what is on its way counts."""

from __future__ import annotations

import pytest

from isotherm.cluster.api.batches.space import Space
from isotherm.cluster.api.batches.state import new_batch
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.errors import ReplyError

MAX = 40_000


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, MAX, 100_000)


def put(store, size, owner=""):
    path = store.new_upload()
    path.write_bytes(b"x" * size)
    return store.add_file(path, "in.jsonl", "batch", owner=owner)


def batch_of(store, owner="", output=0):
    batch = new_batch("batch_" + "a" * 32, "/v1/completions", put(store, 10, owner)["id"], "1h", None, None, 0, owner)
    store.add_batch(batch)
    with store.lines_of(batch["id"], "output.jsonl", print) as file:
        file.write(b"y" * output)
    return batch


def refused(hold, size):
    with pytest.raises(ReplyError, match="delete files") as info:
        hold.grow(size)
    assert (info.value.status, info.value.code) == (413, "storage_full")
    return info.value.message


def test_there_is_a_bound(store):
    put(store, MAX - 3000)
    with store.space.hold("") as hold:
        hold.grow(1000)
        assert f"left of the {MAX} that this server keeps" in refused(hold, 4000)
    batch_of(store, output=3000)
    assert store.space.left("") < 0 and store.space.is_full_for(""), "what batches write counts too"


def test_a_key_has_a_quarter_and_half_of_what_is_free_beyond(store):
    put(store, 9000, "a")
    with store.space.hold("a") as hold, store.space.hold("b") as other:
        assert f"left of the {MAX // 4} that one key may keep here, and half of what is free" in refused(hold, 16_000)
        hold.grow(12_000)
        other.grow(9000)
    batch_of(store, "a", 10_000)
    assert not store.space.is_full_for("a"), "there is room"
    put(store, 20_000, "b")
    assert store.space.is_full_for("a") and store.space.is_full_for("b") and not store.space.is_full_for("c")


def test_what_is_on_its_way_counts(store):
    with store.space.hold("a") as first, store.space.hold("a") as second, store.space.hold("b") as other:
        first.grow(6000)
        refused(second, 17_001)
        second.grow(3000)
        first.grow(7000)
        refused(first, 22_001)
        other.grow(10_000)
    assert store.space.left("a") == MAX // 2 and store.space.left("") == MAX


def test_one_that_does_not_know_its_size_takes_what_it_wishes_or_what_there_is(store):
    with store.space.hold("a") as hold:
        hold.grow(100, 8000)
        assert hold.size == 8000
        hold.grow(8001, 16_000)
        assert hold.size == 16_000
        hold.grow(16_001, MAX)
        assert hold.size == 28_000
        refused(hold, 34_001)


def test_what_one_keeps_ends_nobody_elses_batch(store):
    put(store, MAX, "a")
    batch_of(store, "b", 5000)
    assert store.space.is_full_for("a") and not store.space.is_full_for("b")
    with store.space.hold("b") as hold:
        assert "this server keeps" in refused(hold, 1)


def test_where_there_is_no_room_at_all_each_may_have_what_all_could_have(store):
    for number in range(8):
        put(store, 6000, f"key {number}")
    assert store.space.left("key 0") < 0 and store.space.is_full_for("key 0"), "more than an eighth"
    put(store, 4000, "less")
    assert not store.space.is_full_for("less")


def test_what_is_nobodys_counts(store, tmp_path):
    put(store, 10_000)
    (tmp_path / "uploads" / "left").write_bytes(b"x" * (MAX - 10_000))
    assert store.space.left("a") < 0 and store.space.is_full_for("")


def test_owners_are_read_once(store, tmp_path, monkeypatch):
    batch_of(store, "a")
    space = Space(tmp_path, MAX)
    before = space.left("a")
    monkeypatch.setattr("isotherm.cluster.api.batches.stored.read", lambda path: pytest.fail(str(path)))
    assert space.left("a") == before < MAX // 2
