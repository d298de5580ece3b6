"""What DeepSeek's EPLB (github.com/deepseek-ai/EPLB) places, written anew from its description, to set the placement
policy beside it on any load.

Every layer by itself: copies are given one by one to the expert with the most rows per copy; then the copies, the
heaviest first, go to the coolest group that has a slot. The hierarchical form first packs neighbouring experts, in
blocks of equal size, onto nodes in the same way, and then does the above within each node.
"""

from __future__ import annotations

import numpy as np


def place(rows_LE: np.ndarray, groups: int, slots: int, nodes: int = 1, blocks: int = 1) -> np.ndarray:
    """Who holds a copy, bool [L, E, G], of the rows [L, E]; all `slots` (per group and layer) are used, though two
    copies of an expert in one group are one. Raises ValueError where groups, experts or blocks cannot be dealt out
    evenly."""
    layers, experts = rows_LE.shape
    if groups % nodes or blocks % nodes or experts % blocks:
        raise ValueError(
            f"{groups} groups and {blocks} blocks of {experts} experts cannot be dealt out evenly to {nodes} nodes"
        )
    holds_LEG = np.zeros((layers, experts, groups), dtype=bool)
    in_node = groups // nodes
    for holds_EG, rows_E in zip(holds_LEG, rows_LE, strict=True):
        node_E = np.repeat(_pack(rows_E.reshape(blocks, -1).sum(axis=1), nodes), experts // blocks)
        for node in range(nodes):
            expert_K = np.flatnonzero(node_E == node)
            copy_C, share_C = _copies(rows_E[expert_K], in_node * slots)
            holds_EG[expert_K[copy_C], node * in_node + _pack(share_C, in_node)] = True
    return holds_LEG


def _copies(rows_K: np.ndarray, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """Which expert each of the copies is of, int [C], and the rows of each, [C]."""
    count_K = np.ones(len(rows_K), dtype=np.int64)
    more = [0] * (copies - len(rows_K))
    for i in range(len(more)):
        more[i] = int((rows_K / count_K).argmax())
        count_K[more[i]] += 1
    copy_C = np.concatenate([np.arange(len(rows_K)), np.array(more, dtype=np.int64)])
    return copy_C, (rows_K / count_K)[copy_C]


def _pack(rows_C: np.ndarray, packs: int) -> np.ndarray:
    """The pack of each item, int [C]: equally many items in each, the heaviest dealt first, to the lightest pack with
    room."""
    most = len(rows_C) // packs
    pack_C, total_P, items_P = np.zeros(len(rows_C), dtype=np.int64), np.zeros(packs), np.zeros(packs, dtype=np.int64)
    for c in np.argsort(-rows_C, kind="stable"):
        p = int(np.where(items_P < most, total_P, np.inf).argmin())
        pack_C[c] = p
        total_P[p] += rows_C[c]
        items_P[p] += 1
    return pack_C
