"""Controllers of several generations over one key-value store: the newest reads what was committed last, and no older
one changes that."""

from __future__ import annotations

import pytest

from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.on_ray import state_store
from isotherm.cluster.on_ray.state_store import StateStore


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """In place of Ray's store."""
    values: dict[bytes, bytes] = {}

    def put(key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> bool:
        existed = key in values
        if overwrite or not existed:
            values[key] = value
        return existed

    def delete(key: bytes, namespace: bytes, del_by_prefix: bool = False) -> None:
        for k in [k for k in values if k == key or (del_by_prefix and k.startswith(key))]:
            del values[k]

    monkeypatch.setattr(state_store, "_internal_kv_put", put)
    monkeypatch.setattr(state_store, "_internal_kv_get", lambda key, namespace: values.get(key))
    monkeypatch.setattr(state_store, "_internal_kv_del", delete)
    monkeypatch.setattr(
        state_store, "_internal_kv_list", lambda prefix, namespace: [k for k in values if k.startswith(prefix)]
    )
    return values


def started(cluster: str = "c1") -> StateStore:
    store = StateStore(cluster)
    store.claim()
    return store


def test_generations_grow_and_the_newest_reads_what_was_written_last(table):
    first = started()
    assert (first.generation, first.read()) == (0, None)
    first.write(b"a")
    first.write(b"b")
    second = started()
    assert (second.generation, second.read()) == (1, b"b")
    third = started()  # the second died before it wrote anything
    assert (third.generation, third.read()) == (2, b"b")
    third.write(b"c")
    assert third.read() == b"c" and len(table) == 1
    assert started("c2").generation == 0


def test_an_older_controller_is_refused_and_changes_nothing(table):
    old = started()
    old.write(b"a")
    old.check()
    new = started()
    with pytest.raises(SupersededError, match="0 is not the newest any more: 1 is"):
        old.write(b"late")
    with pytest.raises(SupersededError):
        old.check()
    new.write(b"b")
    table[old._key(0)] = b"late"  # it had looked before, and was stopped before it wrote
    assert new.read() == b"b"
    newest = started()
    assert (newest.generation, newest.read()) == (2, b"b")


def test_of_those_who_claim_at_once_each_is_a_generation_of_its_own(table, monkeypatch):
    one, other = StateStore("c1"), StateStore("c1")
    newest, raced = StateStore._newest, []

    def slow(store: StateStore) -> int:
        seen = newest(store)
        if not raced:
            raced.append(True)
            other.claim()
        return seen

    monkeypatch.setattr(StateStore, "_newest", slow)
    one.claim()
    assert {one.generation, other.generation} == {0, 1}


def test_nothing_is_left_of_a_cluster_that_has_ended(table):
    store = started()
    store.write(b"a")
    other = started("c2")
    store.clear()
    store.check()
    assert list(table) == [other._key(0)]
