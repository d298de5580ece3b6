"""A layer's rows split over the groups that hold their experts. Pure: touches no link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isotherm.cluster.placement.table import Placement

NONE, FIRST = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class LayerTable:
    """One MoE layer's placement as arrays: copies[e, j] is the index of the group with expert e's j-th copy, for j <
    count[e]."""

    copies: np.ndarray  # int32 [E, most copies]
    count: np.ndarray  # int32 [E]
    groups: tuple[int, ...]  # every group that holds some expert of this layer

    def alive(self, failed: Sequence[bool]) -> np.ndarray:
        """Which copies can be reached, bool [E, most copies], where these groups have failed."""
        there: np.ndarray = ~np.array(failed)[self.copies] & (np.arange(self.copies.shape[1]) < self.count[:, None])
        return there


@dataclass(frozen=True)
class GroupShare:
    """What one group computes of a layer."""

    group: int
    rows_U: np.ndarray  # int64: which of the step's rows it needs
    rows_P: np.ndarray  # int32: each pair's row among rows_U
    experts_A: np.ndarray  # int32, ascending
    offsets_A1: np.ndarray  # int32
    pairs_P: np.ndarray  # int64: each pair's place in the flattened [T, k] of the router


def layer_tables(placement: Placement, groups: tuple[str, ...]) -> dict[int, LayerTable]:
    number = {g: i for i, g in enumerate(groups)}
    tables = {}
    for layer, experts in zip(placement.layers, placement.holders, strict=True):
        count = np.array([len(h) for h in experts], dtype=np.int32)
        copies = np.zeros((len(experts), count.max()), dtype=np.int32)
        for e, holders in enumerate(experts):
            copies[e, : len(holders)] = [number[g] for g in holders]
        tables[layer] = LayerTable(copies, count, tuple(sorted({number[g] for holders in experts for g in holders})))
    return tables


def split_rows(ids_Tk: np.ndarray, table: LayerTable, turn: int = 0) -> list[GroupShare]:
    """Each group's share of the pairs in `ids` (expert ids, int32). The rows of an expert with several copies go to
    them in turn, beginning with copy `turn`, so that single rows do not all land on the first."""
    rows, top_k = ids_Tk.shape
    order = ids_Tk.ravel().argsort(kind="stable")
    expert_P = ids_Tk.ravel()[order]
    if len(table.groups) == 1:
        return [share_of(table.groups[0], rows, top_k, order, expert_P)]
    if table.copies.shape[1] == 1:
        group_P = table.copies[expert_P, 0]
    else:
        starts = _run_starts(expert_P)
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        group_P = table.copies[expert_P, (rank + turn) % table.count[expert_P]]
    shares = []
    for group in table.groups:
        mine = (group_P == group).nonzero()[0]
        if len(mine):
            shares.append(share_of(group, rows, top_k, order[mine], expert_P[mine]))
    return shares


def share_of(group: int, rows: int, top_k: int, pairs_P: np.ndarray, expert_P: np.ndarray) -> GroupShare:
    row_P = pairs_P // top_k
    needed = np.zeros(rows, dtype=bool)
    needed[row_P] = True
    rows_U = needed.nonzero()[0]
    if len(rows_U) < rows:
        row_P = (needed.cumsum() - 1)[row_P]
    starts = _run_starts(expert_P)
    offsets = np.empty(len(starts) + 1, dtype=np.int32)
    offsets[:-1], offsets[-1] = starts, len(pairs_P)
    return GroupShare(group, rows_U, row_P.astype(np.int32), expert_P[starts], offsets, pairs_P)


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.concatenate([FIRST, (values[1:] != values[:-1]).nonzero()[0] + 1]) if len(values) else NONE
