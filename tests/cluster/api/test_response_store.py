from __future__ import annotations

from isotherm.cluster.api.response_store import Kept, MemoryResponseStore


def kept(name, size=100, previous=None):
    filler = "x" * size
    return Kept.of({"id": name, "previous_response_id": previous, "filler": filler}, [{"id": "item"}])


def test_what_is_kept_comes_back_to_its_owner_alone():
    store = MemoryResponseStore(10_000)
    store.put("me", kept("a", previous="z"))
    found = store.get("me", "a")
    assert found is not None and (found.response["id"], found.previous) == ("a", "z")
    assert found.input_items == [{"id": "item"}]
    assert store.get("you", "a") is None and not store.delete("you", "a")
    assert store.delete("me", "a") and not store.delete("me", "a") and store.get("me", "a") is None


def test_the_longest_unused_leave_first_and_one_key_has_a_quarter():
    size = kept("00").size
    store = MemoryResponseStore(8 * size)
    for name in ("00", "01"):
        store.put("me", kept(name))
    assert store.get("me", "00") is not None  # used: now "01" is the oldest
    store.put("me", kept("02"))
    assert [store.get("me", name) is not None for name in ("00", "01", "02")] == [True, False, True]
    for owner in "abcd":
        store.put(owner, kept("00"))
        store.put(owner, kept("01"))
    assert store.get("me", "00") is None and store.get("me", "02") is None
    assert all(store.get(owner, name) for owner in "abcd" for name in ("00", "01"))
    store.put("me", kept("00", size=3 * size))  # more than its share: not at all, and nothing leaves for it
    assert store.get("me", "00") is None and store.get("a", "00") is not None
