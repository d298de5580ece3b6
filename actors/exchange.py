"""The shard's side of the expert exchange: split a layer's rows over groups by the placement, send, and add up what comes back.

`split_rows` decides and touches no link; `ExpertExchange` acts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.expert_worker import Dispatch, ExpertNotHeldError
from isotherm.cluster.placement import Placement
from isotherm.kernels.ops import Kernels, LinearWeight, Router

log = logging.getLogger(__name__)
_FIRST = np.zeros(1, dtype=np.int64)


class Link(Protocol):
    """The shard's end of a link to one group. One message is under way at a time."""

    kind: str

    def send(self, message: Dispatch) -> None:
        """Start one exchange. Raises LinkError."""

    def receive(self) -> Tensor:
        """Outputs [P, D] of the message sent last. Raises LinkError, or ExpertNotHeldError as the group said it."""

    def in_step(self, inside: bool) -> None:
        """Tell the group whether this shard is inside a step, so that others' messages may wait for its own. Never raises."""

    def close(self) -> None:
        """Tell the peer and let go. Never raises."""


class LinkError(ConnectionError):
    """The peer died, hangs, or broke the protocol: the link is of no more use."""


@dataclass(frozen=True)
class LayerTable:
    """One MoE layer's placement as arrays: copies[e, j] is the index of the group with expert e's j-th copy, for j < count[e]."""

    copies: np.ndarray  # int32 [E, most copies]
    count: np.ndarray  # int32 [E]
    groups: tuple[int, ...]  # every group that holds some expert of this layer


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
    """Each group's share of the pairs in `ids` (expert ids, int32). The rows of an expert with several copies go to them in turn, beginning with
    copy `turn`, so that single rows do not all land on the first."""
    rows, top_k = ids_Tk.shape
    order = ids_Tk.ravel().argsort(kind="stable")
    expert_P = ids_Tk.ravel()[order]
    if len(table.groups) == 1:
        return [_share(table.groups[0], rows, top_k, order, expert_P)]
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
            shares.append(_share(group, rows, top_k, order[mine], expert_P[mine]))
    return shares


def _share(group: int, rows: int, top_k: int, pairs_P: np.ndarray, expert_P: np.ndarray) -> GroupShare:
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
    return np.concatenate([_FIRST, (values[1:] != values[:-1]).nonzero()[0] + 1]) if len(values) else _FIRST[:0]


class ExpertsLostError(ConnectionError):
    """Experts that a layer needs are held by no group that can be reached, and no placement that helps came in time."""


class ExpertExchange:
    """The routed experts of all layers, wherever they are. `links` maps group names to links.

    One thread runs the steps; others may `offer` placements at any time. When a group is lost in mid-layer its rows are sent to other copies; where
    there is none, the layer waits up to `patience` seconds for a placement that has one. No step is redone.
    """

    def __init__(self, kernels: Kernels, placement: Placement, links: Mapping[str, Link], patience: float = 120.0):
        self.kernels = kernels
        self._patience = patience
        self._turns: dict[int, int] = {}  # by layer: counted over all layers, a layer's turn would always be odd, or even
        self._offers = threading.Condition()
        self._offered: tuple[Placement, Mapping[str, Link]] | None = None
        self._on_adopted: list[Callable[[], None]] = []
        self._lost: set[str] = set()  # groups whose link has failed under the placement in force
        self._row_index = {layer: i for i, layer in enumerate(placement.layers)}
        self.rows_routed = np.zeros((len(placement.layers), len(placement.holders[0]) if placement.holders else 0), dtype=np.int64)
        self.reads = np.zeros_like(self.rows_routed)  # times that each expert was computed at all, so that its weights were read
        self.waited: dict[str, float] = {}  # group → seconds spent waiting for its answers, once those of the groups before it had come
        self.adopt(placement, links)

    def adopt(self, placement: Placement, links: Mapping[str, Link]) -> None:
        """Route by this placement from the next dispatch on. Call on the stepping thread, between layers."""
        groups = placement.groups()
        missing = [g for g in groups if g not in links]
        if missing:
            raise ValueError(f"placement version {placement.version} names groups {missing} that this shard has no link to")
        self.placement, self._groups, self._links = placement, groups, [links[g] for g in groups]
        self._tables = layer_tables(placement, groups)
        self._lost.clear()

    def offer(self, placement: Placement, links: Mapping[str, Link], adopted: Callable[[], None]) -> None:
        """Ask for a placement to be adopted at the next layer boundary; `adopted` is called on the stepping thread when it is. Any thread."""
        with self._offers:
            self._offered = placement, links
            self._on_adopted.append(adopted)  # who offered an earlier one is told too: that one is out of force as well
            self._offers.notify()

    def adopt_offered(self) -> None:
        """Adopt what was offered last, if anything. On the stepping thread, between layers."""
        with self._offers:
            offered, self._offered = self._offered, None
            on_adopted, self._on_adopted = self._on_adopted, []
        if offered is not None:
            self.adopt(*offered)
        for adopted in on_adopted:
            adopted()

    def begin_step(self) -> None:
        for link in self._links:
            link.in_step(True)

    def end_step(self) -> None:
        for link in self._links:
            link.in_step(False)

    def moe(self, layer: int, x_TD: Tensor, router: Router, gate_up: LinearWeight | None, down: LinearWeight | None, residual_TD: Tensor) -> Tensor:
        """residual + (Σ weight × expert + shared experts) → [T, D]. Where links allow it, the shared experts overlap the exchange."""
        self.dispatch(layer, x_TD, *self.kernels.route(x_TD, router))
        own_TD = None if gate_up is None or down is None else self.kernels.mlp(x_TD, gate_up, down)
        return self.combine(own_TD, residual_TD)

    def dispatch(self, layer: int, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> None:
        if self._offered is not None:
            self.adopt_offered()
            self.begin_step()
        turn = self._turns[layer] = self._turns.get(layer, layer) + 1
        ids = ids_Tk.cpu().numpy()
        self._layer, self._x_TD, self._ids_Tk, self._weights_Tk = layer, x_TD, ids, weights_Tk
        self._shares = split_rows(ids, self._tables[layer], turn)
        for share in self._shares:
            self._send(share)
        rows_E = np.bincount(ids.ravel(), minlength=self.rows_routed.shape[1])  # while the groups compute
        self.rows_routed[self._row_index[layer]] += rows_E
        self.reads[self._row_index[layer]] += rows_E > 0

    def _send(self, share: GroupShare) -> None:
        if self._groups[share.group] in self._lost:
            return
        rows_U = share.rows_U
        x_UD = self._x_TD if len(rows_U) == len(self._x_TD) else self._x_TD[torch.from_numpy(rows_U)]
        message = Dispatch(self._layer, self.placement.version, x_UD, share.rows_P, share.experts_A, share.offsets_A1)
        try:
            self._links[share.group].send(message)
        except LinkError as error:
            self._lose(share.group, error)

    def _lose(self, group: int, error: LinkError) -> None:
        log.warning("expert group %s is lost: %s", self._groups[group], error)
        self._lost.add(self._groups[group])

    def combine(self, own_TD: Tensor | None = None, residual_TD: Tensor | None = None) -> Tensor:
        answered, outputs = self._receive(self._shares)
        while sum(len(share.pairs_P) for share in answered) < self._weights_Tk.numel():
            # What has come is copied: views into a link's memory end with its next message.
            outputs = [y.clone() for y in outputs]
            done = np.concatenate([_FIRST[:0], *(share.pairs_P for share in answered)])
            more, new = self._receive(self._resend(np.setdiff1d(np.arange(self._weights_Tk.numel()), done)))
            answered, outputs = answered + more, outputs + new
        index = np.empty(self._weights_Tk.numel(), dtype=np.int32)
        index[np.concatenate([share.pairs_P for share in answered])] = np.arange(len(index), dtype=np.int32)
        y_PD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.kernels.combine(y_PD, torch.from_numpy(index).view(self._weights_Tk.shape), self._weights_Tk, own_TD, residual_TD)

    def _receive(self, shares: list[GroupShare]) -> tuple[list[GroupShare], list[Tensor]]:
        """The shares that were answered, with their outputs. Every link is read, so that none is left with an answer under way."""
        answered, outputs, refusal = [], [], None
        for share in shares:
            if self._groups[share.group] in self._lost:
                continue
            begin = time.perf_counter()
            try:
                outputs.append(self._links[share.group].receive())
                answered.append(share)
            except LinkError as error:
                self._lose(share.group, error)
            except ExpertNotHeldError as error:
                refusal = error
            name = self._groups[share.group]
            self.waited[name] = self.waited.get(name, 0.0) + time.perf_counter() - begin
        if refusal is not None:
            raise refusal
        return answered, outputs

    def _resend(self, pairs: np.ndarray) -> list[GroupShare]:
        """Send the given pairs (places in the flattened [T, k]) to groups that are left, waiting for a placement that has their experts."""
        deadline = time.monotonic() + self._patience
        top_k = self._ids_Tk.shape[1]
        experts = self._ids_Tk.ravel()[pairs]
        while True:
            table = self._tables[self._layer]
            lost = np.isin(np.arange(len(self._groups)), [i for i, g in enumerate(self._groups) if g in self._lost])
            alive = ~lost[table.copies] & (np.arange(table.copies.shape[1]) < table.count[:, None])
            orphans = np.unique(experts[~alive.any(axis=1)[experts]])
            if not len(orphans):
                break
            with self._offers:
                if not self._offers.wait_for(lambda: self._offered is not None, timeout=max(0.0, deadline - time.monotonic())):
                    where = f"layer {self._layer}: no group that can be reached holds experts {orphans.tolist()}"
                    raise ExpertsLostError(f"{where}, and in {self._patience:g} s none was given them")
            self.adopt_offered()
            self.begin_step()
        # One row per pair: its expert, at the first copy that is left.
        group_P = table.copies[experts, alive.argmax(axis=1)[experts]]
        shares = []
        for group in np.unique(group_P):
            mine = (group_P == group).nonzero()[0]
            mine = mine[experts[mine].argsort(kind="stable")]
            shares.append(_share(int(group), len(self._x_TD), top_k, pairs[mine], experts[mine]))
        for share in shares:
            self._send(share)
        return shares


class InProcessLink:
    """A function call to a worker in this process."""

    kind = "in-process"

    def __init__(self, compute):
        self._compute = compute

    def send(self, message: Dispatch) -> None:
        self._message = message

    def receive(self) -> Tensor:
        return self._compute(self._message)

    def in_step(self, inside: bool) -> None:
        pass

    def close(self) -> None:
        pass
