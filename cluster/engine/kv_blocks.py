"""Paged KV-cache blocks with a prefix cache. Pure bookkeeping: block numbers and keys, no tensors.

A block is in use (some sequence refers to it), or cached (nobody does, but it holds a known prefix and can be found by
its key), or free. Cached blocks are evicted least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT_KEY = b"isotherm"


def root_key(tenant: str) -> bytes:
    """What stands for "all before" the first block. It is in the key of every later one, so that no block is known to
    two tenants, and the time that a prompt takes tells nobody what another one has asked."""
    if not tenant:
        return ROOT_KEY
    return hashlib.blake2b(tenant.encode(), digest_size=16, key=ROOT_KEY).digest()


def block_key(parent: bytes, tokens: Sequence[int], prefill_tokens: int) -> bytes:
    """Name of a full block: its tokens, all before them (through `parent`), and how many of its tokens were computed in
    prefill form.

    The two forms round differently, so a block is only shared with a request that would have computed the same bits.
    """
    return hashlib.blake2b(parent + array("q", [prefill_tokens, *tokens]).tobytes(), digest_size=16).digest()


class BlockManager:
    """Hands out the numbers 0 … blocks-1."""

    def __init__(self, blocks: int, block_size: int):
        if blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, found {blocks} blocks of {block_size}")
        self.blocks, self.block_size = blocks, block_size
        self._free = list(range(blocks - 1, -1, -1))
        self._references = [0] * blocks
        self.registered = 0  # blocks that `match` came to know, ever
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Unreferenced blocks with a key, least recently used first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.blocks - self.available

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def knows(self, key: bytes) -> bool:
        """Whether `match` would find a block."""
        return key in self._block_of

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Take a reference to the blocks of the longest prefix of `keys` that is held."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing changed) when there are not enough."""
        if count > self.available:
            return None
        out = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            out.append(block)
        return out

    def register(self, block: int, key: bytes) -> None:
        """Say that a block in use is full and computed, so that `match` may find it. A key that is held already stays
        with its block."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key
            self.registered += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each. The last block becomes the first to be evicted: a prefix outlives its
        continuations."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
