"""Which peer each expert is copied from."""

from __future__ import annotations

from isotherm.cluster.placement.copy_sources import copy_sources
from isotherm.cluster.placement.table import Placement

TABLE = Placement(3, (1, 2), ((("a",), ("b",), ("a", "b")), (("a", "c"), ("b", "c"), ("c",))))
ALL = [(layer, expert) for layer in (1, 2) for expert in range(3)]


def test_each_pair_has_one_peer_and_these_share_the_work():
    assert copy_sources(ALL, TABLE, ["a", "b", "c"], ()) == {
        "a": [(1, 0), (1, 2)],
        "b": [(1, 1), (2, 1)],
        "c": [(2, 0), (2, 2)],
    }


def test_the_same_node_comes_first():
    assert copy_sources(ALL, TABLE, ["a", "b", "c"], ["a"])["a"] == [(1, 0), (1, 2), (2, 0)]


def test_who_is_no_peer_is_not_asked():
    assert copy_sources(ALL, TABLE, ["c"], ()) == {"c": [(2, 0), (2, 1), (2, 2)]}
    assert copy_sources(ALL, TABLE, [], ()) == {} == copy_sources([], TABLE, ["a"], ())


def test_a_cluster_that_starts_has_no_peers():
    assert copy_sources(ALL, Placement(0, (), ()), ["a", "b"], ["a"]) == {}
