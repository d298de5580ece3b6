from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.placement.table import Placement, contiguous_placement


def test_who_holds_what():
    placement = Placement(3, (1, 4), ((("b",), ("a", "b")), (("c",), ("b",))))
    assert placement.groups() == ("a", "b", "c")
    assert placement.held_by("a") == [(1, 1)]
    assert placement.held_by("b") == [(1, 0), (1, 1), (4, 1)]
    assert placement.held_by("c") == [(4, 0)]
    assert placement.held_by("d") == []


def test_layers_and_holders_must_go_together():
    with pytest.raises(ValueError, match="2 layers but holders of 1"):
        Placement(1, (1, 2), ((("a",),),))


@pytest.mark.parametrize("holders", [(), ("a", "a"), ("a", "b", "a")])
def test_an_expert_has_one_or_more_distinct_holders(holders: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"layer 7 expert 1: holders \[.*\] must be one or more distinct groups"):
        Placement(1, (7,), ((("a",), holders),))


def test_a_placement_cannot_be_changed():
    placement = contiguous_placement((1,), 4, ["a"])
    with pytest.raises(AttributeError):
        placement.version = 2  # type: ignore[misc]
    assert hash(placement) == hash(contiguous_placement((1,), 4, ["a"]))


@given(
    layers=st.lists(st.integers(0, 60), unique=True, max_size=4), experts=st.integers(1, 40), groups=st.integers(1, 9)
)
def test_contiguous_placement_cuts_every_layer_into_equal_runs(layers: list[int], experts: int, groups: int):
    names = [f"g{i}" for i in range(groups)]
    placement = contiguous_placement(sorted(layers), experts, names, version=4)
    assert (placement.version, placement.layers) == (4, tuple(sorted(layers)))
    for row in placement.holders:
        holders = [holder for (holder,) in row]
        assert len(holders) == experts and holders == sorted(holders)
        counts = Counter({n: 0 for n in names} | Counter(holders))
        assert max(counts.values()) - min(counts.values()) <= 1
    held = [pair for name in names for pair in placement.held_by(name)]
    assert sorted(held) == [(layer, e) for layer in sorted(layers) for e in range(experts)]


def test_a_model_without_routed_experts_needs_no_group():
    assert contiguous_placement((), 4, ["a"]).groups() == ()


def test_no_group_at_all_is_an_error():
    with pytest.raises(ValueError, match="needs at least one expert group"):
        contiguous_placement((1,), 4, [])
