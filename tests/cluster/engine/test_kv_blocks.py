from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.engine.kv_blocks import ROOT_KEY, BlockManager, block_key, root_key


def counts(manager: BlockManager) -> tuple[int, int, int]:
    return manager.used, manager.available, manager.cached


def fill(manager: BlockManager, *keys: bytes) -> list[int]:
    """Blocks in use that hold these keys, in order."""
    blocks = manager.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        manager.register(block, key)
    return blocks


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (-1, 4), (4, 0)])
def test_sizes_below_one_are_refused(blocks: int, size: int):
    with pytest.raises(ValueError, match=f"{blocks} blocks of {size}"):
        BlockManager(blocks, size)


def test_allocation_hands_out_each_block_once():
    manager = BlockManager(5, 4)
    first, second = manager.allocate(2), manager.allocate(3)
    assert first is not None and second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert counts(manager) == (5, 0, 0)


def test_allocation_of_too_many_changes_nothing():
    manager = BlockManager(3, 4)
    manager.allocate(1)
    assert manager.allocate(3) is None
    assert counts(manager) == (1, 2, 0)
    assert manager.allocate(0) == []


def test_released_blocks_without_a_key_are_free_at_once():
    manager = BlockManager(2, 4)
    blocks = manager.allocate(2)
    assert blocks is not None
    manager.release(blocks)
    assert counts(manager) == (0, 2, 0)


def test_match_takes_the_longest_held_prefix_only():
    manager = BlockManager(4, 4)
    blocks = fill(manager, b"a", b"b", b"d")
    assert manager.match([b"a", b"b", b"c", b"d"]) == blocks[:2]
    assert manager.match([b"x", b"a"]) == []


def test_a_matched_block_stays_in_use_until_its_last_reader_lets_go():
    manager = BlockManager(2, 4)
    (block,) = fill(manager, b"a")
    assert manager.match([b"a"]) == [block]
    manager.release([block])
    assert counts(manager) == (1, 1, 0)
    assert manager.allocate(2) is None
    manager.release([block])
    assert counts(manager) == (0, 2, 1)


def test_a_cached_block_can_be_matched_again_and_is_not_handed_out_then():
    manager = BlockManager(2, 4)
    (block,) = fill(manager, b"a")
    manager.release([block])
    assert manager.match([b"a"]) == [block]
    assert counts(manager) == (1, 1, 0)
    other = manager.allocate(1)
    assert other is not None and other != [block]
    assert manager.allocate(1) is None


def test_free_blocks_are_taken_before_cached_ones():
    manager = BlockManager(3, 4)
    cached = fill(manager, b"a")
    manager.release(cached)
    taken = manager.allocate(2)
    assert taken is not None and cached[0] not in taken
    assert manager.match([b"a"]) == cached


def test_the_least_recently_used_block_is_evicted_first_and_forgotten():
    manager = BlockManager(3, 4)
    a, b, c = fill(manager, b"a", b"b", b"c")
    manager.release([a])
    manager.release([b])
    manager.release([c])
    manager.release(manager.match([b"a"]))  # a is now the most recently used
    assert manager.allocate(1) == [b]
    assert manager.match([b"b"]) == []
    assert manager.allocate(1) == [c]
    assert manager.match([b"a"]) == [a]


def test_the_end_of_a_released_prefix_is_evicted_before_its_beginning():
    manager = BlockManager(3, 4)
    blocks = fill(manager, b"a", b"b", b"c")
    manager.release(blocks)
    manager.allocate(1)
    assert manager.match([b"a", b"b", b"c"]) == blocks[:2]


def test_an_evicted_blocks_key_can_be_held_by_another_block():
    manager = BlockManager(1, 4)
    manager.release(fill(manager, b"a"))
    (block,) = fill(manager, b"b")  # evicts a
    assert manager.match([b"a"]) == []
    manager.release([block])
    assert manager.match([b"b"]) == [block]


def test_a_key_that_is_held_stays_with_its_block():
    manager = BlockManager(2, 4)
    first = fill(manager, b"a")
    second = fill(manager, b"a")  # computed twice at the same time
    manager.release(second)
    assert counts(manager) == (1, 1, 0)  # the second copy is of no use: free, not cached
    assert manager.match([b"a"]) == first


def test_a_block_keeps_its_first_key():
    manager = BlockManager(1, 4)
    (block,) = fill(manager, b"a")
    manager.register(block, b"b")
    manager.release([block])
    assert manager.match([b"b"]) == []
    assert manager.match([b"a"]) == [block]


def test_releasing_too_often_is_an_error():
    manager = BlockManager(2, 4)
    blocks = manager.allocate(1)
    assert blocks is not None
    manager.release(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[0]} "):
        manager.release(blocks)


def test_keys_name_tokens_their_order_their_past_and_their_form():
    base = block_key(ROOT_KEY, [1, 2, 3, 4], 4)
    assert base == block_key(ROOT_KEY, (1, 2, 3, 4), 4)
    different = [
        block_key(ROOT_KEY, [1, 2, 4, 3], 4),
        block_key(ROOT_KEY, [1, 2, 3, 5], 4),
        block_key(ROOT_KEY, [1, 2, 3], 4),
        block_key(ROOT_KEY, [1, 2, 3, 4], 3),  # the last token was computed in decode form
        block_key(ROOT_KEY, [1, 2, 3, 4], 0),
        block_key(base, [1, 2, 3, 4], 4),
    ]
    assert len({base, *different}) == 7


Action = tuple[str, int]


ACTIONS = st.sampled_from(["allocate", "match", "release", "register"])


@given(st.integers(1, 6), st.lists(st.tuples(ACTIONS, st.integers(0, 20)), max_size=60))
def test_any_sequence_of_calls_agrees_with_a_plain_model(blocks: int, actions: list[Action]):
    """Holders are lists of blocks; the model knows who holds what and which key each block was given since it was last
    handed out."""
    manager = BlockManager(blocks, 4)
    holders: list[list[int]] = []
    key_of: dict[int, bytes] = {}
    for action, n in actions:
        held = {b for h in holders for b in h}
        if action == "allocate":
            taken = manager.allocate(n % 4)
            assert (taken is None) == (n % 4 > blocks - len(held))
            if taken is not None:
                assert not held & set(taken) and len(set(taken)) == len(taken)
                for block in taken:
                    key_of.pop(block, None)
                holders.append(taken)
        elif action == "match":
            keys = [bytes([k]) for k in (n % 3, n % 5, n % 7)]
            found = manager.match(keys)
            block_of = {key: block for block, key in key_of.items()}
            expected = []
            for key in keys:
                if key not in block_of:
                    break
                expected.append(block_of[key])
            assert found == expected
            holders.append(found)
        elif action == "register" and held:
            block, key = sorted(held)[n % len(held)], bytes([n % 7])
            manager.register(block, key)
            if block not in key_of and key not in key_of.values():
                key_of[block] = key
        elif action == "release" and holders:
            manager.release(holders.pop(n % len(holders)))
        held = {b for h in holders for b in h}
        assert manager.used == len(held)
        assert manager.used + manager.available == manager.blocks
        assert manager.cached == len(set(key_of) - held)
    for holder in holders:
        manager.release(holder)
    assert manager.used == 0
    every = manager.allocate(blocks)
    assert every is not None and sorted(every) == list(range(blocks))


def test_each_tenant_has_keys_of_its_own_and_nobody_in_particular_has_the_plain_ones():
    assert root_key("") == ROOT_KEY
    roots = [root_key(tenant) for tenant in ("", "a", "b", "isotherm")]
    keys = {block_key(root, (1, 2, 3, 4), 4) for root in roots}
    assert len(keys) == 4 and root_key("a") == roots[1]
