from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.messages.operations import PlacementChangeError
from isotherm.cluster.placement.changes import difference, for_groups, with_copies
from isotherm.cluster.placement.table import Placement, contiguous_placement

names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True).map(tuple)


@st.composite
def placements(draw) -> Placement:
    groups, experts, layers = draw(names), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    holders = st.lists(st.sampled_from(groups), min_size=1, max_size=len(groups), unique=True).map(
        lambda h: tuple(sorted(h))
    )
    return Placement(
        3, tuple(range(2, 2 + layers)), tuple(tuple(draw(holders) for _ in range(experts)) for _ in range(layers))
    )


def apply(old: Placement, new: Placement) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The old holders after every load and every free of the difference."""
    change = difference(old, new)
    table = {(layer, e): set(h) for layer, row in zip(old.layers, old.holders, strict=True) for e, h in enumerate(row)}
    for group, pairs in change.loads.items():
        for pair in pairs:
            assert group not in table[pair]
            table[pair].add(group)
    for group, pairs in change.frees.items():
        for pair in pairs:
            table[pair].remove(group)
    return tuple(
        tuple(tuple(sorted(table[layer, e])) for e in range(len(row)))
        for layer, row in zip(old.layers, old.holders, strict=True)
    )


@given(placements(), names)
def test_groups_change_and_nobody_is_left_out(old, groups):
    new = for_groups(old, groups)
    assert new.version == old.version + 1 and set(new.groups()) <= set(groups)
    assert apply(old, new) == new.holders
    for row in new.holders:
        loads = {g: sum(1 / len(h) for h in row if g in h) for g in groups}
        movable = [1 / len(h) for h in row if max(loads, key=loads.get) in h and min(loads, key=loads.get) not in h]
        gap = max(loads.values()) - min(loads.values())
        assert not [m for m in movable if m < gap * (1 - 1e-6)], "another move would have helped"
    assert difference(new, for_groups(new, groups)).moves == 0, "asking again changes nothing"


def test_a_new_group_takes_its_share_and_no_more():
    old = contiguous_placement([1, 2, 3], 16, ["a", "b"])
    new = for_groups(old, ["a", "b", "c", "d"])
    assert {g: len(new.held_by(g)) for g in "abcd"} == dict.fromkeys("abcd", 12)
    assert difference(old, new).moves == 24
    assert {g: len(for_groups(new, ["a", "b"]).held_by(g)) for g in "ab"} == {"a": 24, "b": 24}


def test_hot_experts_count_by_their_load():
    old = contiguous_placement([0], 4, ["a", "b"])
    new = for_groups(old, ["a", "b"], load=[[90.0, 80.0, 1.0, 1.0]])
    assert {len(set(new.held_by(g)) & {(0, 0), (0, 1)}) for g in "ab"} == {1}


def test_no_group_gets_more_than_it_has_room_for():
    """Cold experts were all given to one group, which then held more than its memory was reckoned for."""
    old = contiguous_placement([0, 1], 12, ["a", "b", "c"])
    load = [[100.0] * 4 + [0.0] * 8] * 2
    new = for_groups(old, ["a", "b"], load, room=13)
    held = {g: len(new.held_by(g)) for g in "ab"}
    assert max(held.values()) <= 13 and sum(held.values()) == 24, held
    assert max(len(for_groups(old, ["a", "b"], load).held_by(g)) for g in "ab") > 13, "the load alone says otherwise"
    assert not for_groups(old, ["a"], load, room=13).orphans([]), (
        "where there is too little room everything has a place"
    )


@given(placements(), names, st.integers(0, 40))
def test_room_leaves_nobody_out(old, groups, room):
    new = for_groups(old, groups, room=room)
    assert apply(old, new) == new.holders and set(new.groups()) <= set(groups)
    most = {g: len(old.held_by(g)) for g in groups}
    if room * len(groups) >= sum(len(held) for experts in old.holders for held in experts):
        assert all(len(new.held_by(g)) <= max(room, most[g]) for g in groups)


@given(placements(), st.data())
def test_copies(old, data):
    groups = old.groups()
    layer = data.draw(st.sampled_from(old.layers))
    expert = data.draw(st.integers(0, len(old.holders[0]) - 1))
    count = data.draw(st.integers(1, len(groups)))
    new = with_copies(old, [(layer, expert, count)], groups)
    assert len(new.holders[old.layers.index(layer)][expert]) == count
    assert apply(old, new) == new.holders
    before = len(old.holders[old.layers.index(layer)][expert])
    assert difference(old, new).moves == max(0, count - before)


def test_without_a_count_the_copies_stay():
    old = with_copies(contiguous_placement([1], 4, ["a", "b"]), [(1, 0, 2)], ["a", "b"])
    assert with_copies(old, [(1, 0, None), (1, 3, None)], ["a", "b"]) == old
    new = with_copies(old, [(1, 0, None), (1, 3, 2)], ["a", "b"])
    assert [len(h) for h in new.holders[0]] == [2, 1, 1, 2] and new.version == old.version + 1


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ((0, 1, 1), "layer 0 has no routed experts"),
        ((1, 99, 1), "expert 99"),
        ((1, 0, 3), "from 1 to the 2"),
        ((1, 0, 0), "count 0"),
        ((0, 1, None), "layer 0 has no routed experts"),
        ((1, 99, None), "expert 99"),
    ],
)
def test_impossible_copies_are_named(wanted, words):
    with pytest.raises(PlacementChangeError, match=words):
        with_copies(contiguous_placement([1], 4, ["a", "b"]), [wanted], ["a", "b"])


def test_the_last_group_stays():
    with pytest.raises(PlacementChangeError):
        for_groups(contiguous_placement([1], 4, ["a"]), [])
