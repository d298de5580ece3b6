"""A MoE layer whose experts are in other processes, in one call (`kernels/native/csrc/exchange.cpp`), reached through
ctypes.

Which links, placements and turns there are is the caller's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isotherm.kernels.native import ring
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.context import created, free_with
from isotherm.kernels.native.router import RouterFields, router_fields
from isotherm.kernels.ops import LinearWeight, Router

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Layer(ctypes.Structure):
    """ExchangeLayer in exchange.h."""

    _fields_ = (
        ("layer", _L), ("version", _L), ("router", RouterFields), ("f32", _I),
        *((name, _P) for name in ("gate_up", "down", "copies", "count")),
        ("most", _L), ("rows_routed", _P), ("reads", _P),
    )  # fmt: skip


class _Step(ctypes.Structure):
    """ExchangeStep in exchange.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "residual", "out")),
        *((name, _L) for name in ("x_stride", "rows", "turn", "patience")),
        *((name, _P) for name in ("ids", "weights", "pairs_sent", "waited")),
    )


class Result(IntEnum):
    """`Exchange::Result` in exchange.h."""

    WHOLE = 0
    OUT_OF_MEMORY = 1
    NOT_SENT = -1  # `pairs_sent` says what was
    NOT_ANSWERED = -2  # what was sent can be received as if this had not tried


@dataclass(frozen=True)
class LayerExperts:
    """Where the experts of one MoE layer are, and the counters of what goes to them, which C++ writes.

    `copies` int32 [E, most]: the number of the link to the group with each copy, for j < `count`[e], int32 [E];
    `rows_routed` and `reads` int64 [E]. Raises TypeError.
    """

    layer: int
    placement_version: int
    copies: np.ndarray
    count: np.ndarray
    rows_routed: np.ndarray
    reads: np.ndarray

    def __post_init__(self) -> None:
        for name, array, dtype in (
            ("copies", self.copies, np.int32),
            ("count", self.count, np.int32),
            ("rows_routed", self.rows_routed, np.int64),
            ("reads", self.reads, np.int64),
        ):
            if array.dtype != dtype or not array.flags.c_contiguous or len(array) != len(self.count):
                raise TypeError(f"{name} is {array.dtype} {array.shape}; {np.dtype(dtype)} of each expert is needed")


@dataclass(frozen=True)
class BoundLayer:
    """A layer as C++ is given it, with what its pointers point to."""

    structure: _Layer
    router: Router
    shared: tuple[LinearWeight | None, LinearWeight | None]
    keep: tuple[object, ...]


class NativeExchange:
    """Over the shard's ends (`iso_end_open`) of the links to all groups, in the order of their numbers: they must
    outlive this, and nothing else may use them during a call. `patience`: seconds that a call waits for an answer."""

    def __init__(self, kernels: NativeKernels, ends: Sequence[int], patience: float, library: Path | None = None):
        self._lib, self._kernels = ring.load(library), kernels
        handle = self._lib.iso_exchange_create(kernels.context.handle, (_P * len(ends))(*ends), len(ends))
        self._handle = created(handle, "an exchange with expert groups")
        free_with(self, self._lib.iso_exchange_destroy, self._handle)
        self.pairs_sent = np.zeros(len(ends), dtype=np.int32)  # by the last call, that are answered or to be received
        self.waited_ns = np.zeros(len(ends), dtype=np.int64)  # for each group, once those before it had answered
        self._ids, self._weights = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        self._step = _Step(
            pairs_sent=self.pairs_sent.ctypes.data, waited=self.waited_ns.ctypes.data, patience=int(patience * 1e9)
        )

    def bind(
        self, experts: LayerExperts, router: Router, gate_up: LinearWeight | None, down: LinearWeight | None
    ) -> BoundLayer:
        """Check that they fit each other. Raises ValueError."""
        fields, tensors = router_fields(router)
        number, hidden = router.weight.shape
        if len(experts.count) != number or (gate_up is None) != (down is None):
            raise ValueError(f"layer {experts.layer} has a router for {number} of {len(experts.count)} experts")
        if gate_up is not None and down is not None and (gate_up.in_features, down.out_features) != (hidden, hidden):
            raise ValueError(f"shared experts go from {gate_up.in_features} to {down.out_features}, not {hidden}")
        structure = _Layer(
            layer=experts.layer, version=experts.placement_version, router=fields,
            f32=self._kernels.dtype == torch.float32, gate_up=None if gate_up is None else gate_up.data.handle,
            down=None if down is None else down.data.handle, copies=experts.copies.ctypes.data,
            count=experts.count.ctypes.data, most=experts.copies.shape[1],
            rows_routed=experts.rows_routed.ctypes.data, reads=experts.reads.ctypes.data,
        )  # fmt: skip
        return BoundLayer(structure, router, (gate_up, down), (experts, *tensors))

    def layer(self, bound: BoundLayer, x_TD: Tensor, residual_TD: Tensor, turn: int) -> tuple[Result, Tensor]:
        """residual + (Σ weight × expert + shared experts) → [T, D], which has no values unless the result is WHOLE.
        The rows of an expert go to its copies in turn, beginning with copy `turn`."""
        hidden, step, dtype = bound.structure.router.hidden, self._step, self._kernels.dtype
        for name, t in (("x", x_TD), ("residual", residual_TD)):
            if t.dtype != dtype or t.shape != (len(x_TD), hidden):
                raise ValueError(f"moe {name} is {t.dtype} {tuple(t.shape)}; {dtype} [T, {hidden}] is needed")
        x, residual = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous(), residual_TD.contiguous()
        pairs = len(x) * bound.router.top_k
        if len(self._ids) < pairs:
            self._ids, self._weights = np.empty(2 * pairs, dtype=np.int32), np.empty(2 * pairs, dtype=np.float32)
            step.ids, step.weights = self._ids.ctypes.data, self._weights.ctypes.data
        out = torch.empty(len(x), hidden, dtype=dtype)
        step.x, step.residual, step.out = x.data_ptr(), residual.data_ptr(), out.data_ptr()
        step.x_stride, step.rows, step.turn = x.stride(0), len(x), turn
        return Result(self._lib.iso_exchange_layer(self._handle, byref(bound.structure), byref(step))), out

    def routed(self, rows: int, top_k: int) -> tuple[Tensor, Tensor]:
        """ids int32 and weights float32 [T, k] of the last call's rows: copies."""
        ids, weights = (a[: rows * top_k].reshape(rows, top_k).copy() for a in (self._ids, self._weights))
        return torch.from_numpy(ids), torch.from_numpy(weights)
