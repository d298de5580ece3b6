"""MoE layers whose experts are in other processes (`kernels/native/csrc/exchange.cpp`), reached through ctypes: one of
them in one call, or one after another with the attention before each.

Which links, placements and turns there are is the caller's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from enum import IntEnum
from operator import is_
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isotherm.kernels.cache_rows import is_fp8
from isotherm.kernels.checked import cache_blocks
from isotherm.kernels.native import ring
from isotherm.kernels.native.backend import OUT_OF_CACHE, NativeKernels
from isotherm.kernels.native.bound import DecoderRows, check_parts
from isotherm.kernels.native.context import created, fail, free_with
from isotherm.kernels.native.router import RouterFields, router_fields
from isotherm.kernels.ops import AttentionRows, DecoderLayer, LinearWeight, Router

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
        *((name, _P) for name in ("ids", "weights", "pairs_sent", "waited", "longest")),
    )


class _FarLayer(ctypes.Structure):
    """FarLayer in exchange.h."""

    _fields_ = (*((name, _P) for name in ("attention", "moe", "gate_up", "down", "cache")), ("turn", _L))


class _FarStep(ctypes.Structure):
    """FarStep in exchange.h."""

    _fields_ = (("rows", _P), ("to", DecoderRows), ("wanted", _P * 2), ("budget", _L), ("at", _L))


class Result(IntEnum):
    """`Exchange::Result` in exchange.h."""

    WHOLE = 0
    OUT_OF_MEMORY = 1
    OUT_OF_CACHE = 2
    NOT_SENT = -1  # `pairs_sent` says what was
    NOT_ANSWERED = -2  # what was sent can be received as if this had not tried
    GIVEN_UP = -3  # before anything of a layer was sent


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


class FarLayers:
    """Decoder layers with their caches as C++ is given them; the experts of the MoE layers are where `moes` says.
    Raises ValueError."""

    def __init__(
        self,
        kernels: NativeKernels,
        layers: Sequence[DecoderLayer],
        moes: Sequence[BoundLayer | None],
        caches: Sequence[Tensor],
    ):
        self.layers, self.moes, self.caches = layers, moes, tuple(caches)
        self.array = (_FarLayer * len(layers))()
        self._attentions, forms = [], set()
        for to, layer, moe, cache in zip(self.array, layers, moes, caches, strict=False):
            weights = kernels.bound.attention(layer.attention)
            self._attentions.append(weights)
            blocks, block_size = cache_blocks(cache, weights.latent, weights.rotary, kernels.dtype)
            forms.add((weights.hidden, weights.rotary, blocks, block_size, is_fp8(cache)))
            to.attention, to.cache = ctypes.addressof(weights.structure), cache.data_ptr()
            if moe is not None:
                to.moe, width = ctypes.addressof(moe.structure), moe.structure.router.hidden
            elif layer.gate_up is None or layer.down is None:
                raise ValueError("a dense decoder layer needs an MLP")
            else:
                check_parts(layer.gate_up, layer.down)
                to.gate_up, to.down, width = layer.gate_up.data.handle, layer.down.data.handle, layer.down.out_features
            if width != weights.hidden:
                raise ValueError(f"a decoder layer's attention gives rows of {weights.hidden}, its MLP of {width}")
        if len(forms) != 1 or len(caches) < len(layers):
            raise ValueError(f"{len(layers)} decoder layers have {len(caches)} caches, and are of such forms: {forms}")
        self.hidden, self.rotary, self.blocks, self.block_size, self.fp8 = forms.pop()
        self.top_k = max((moe.router.top_k for moe in moes if moe is not None), default=0)

    def fits(self, layers: Sequence[DecoderLayer], caches: Sequence[Tensor]) -> bool:
        return self.layers is layers and len(self.caches) == len(caches) and all(map(is_, self.caches, caches))


class NativeExchange:
    """Over the shard's ends (`iso_end_open`) of the links to all groups, in the order of their numbers: they must
    outlive this, and nothing else may use them during a call. `patience`: seconds that a call waits for an answer.
    `wanted`: int32 [1] each; not 0 as soon as a call for several layers shall end."""

    def __init__(
        self,
        kernels: NativeKernels,
        ends: Sequence[int],
        patience: float,
        wanted: tuple[np.ndarray, np.ndarray],
        library: Path | None = None,
    ):
        self._lib, self._kernels = ring.load(library), kernels
        handle = self._lib.iso_exchange_create(kernels.context.handle, (_P * len(ends))(*ends), len(ends))
        self._handle = created(handle, "an exchange with expert groups")
        free_with(self, self._lib.iso_exchange_destroy, self._handle)
        self.pairs_sent = np.zeros(len(ends), dtype=np.int32)  # by the last call, that are answered or to be received
        self.waited_ns = np.zeros(len(ends), dtype=np.int64)  # for each group, once those before it had answered
        self.longest_ns = np.zeros(1, dtype=np.int64)  # of the longest of these waits
        self._ids, self._weights = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        self._step = _Step(
            pairs_sent=self.pairs_sent.ctypes.data, waited=self.waited_ns.ctypes.data,
            longest=self.longest_ns.ctypes.data, patience=int(patience * 1e9),
        )  # fmt: skip
        if any(flag.dtype != np.int32 for flag in wanted):
            raise TypeError(f"flags are {[flag.dtype for flag in wanted]}; int32 is needed")
        self._wanted, self._far = wanted, _FarStep(wanted=(_P * 2)(*(flag.ctypes.data for flag in wanted)))

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
        self._make_room(len(x) * bound.router.top_k)
        out = torch.empty(len(x), hidden, dtype=dtype)
        step.x, step.residual, step.out = x.data_ptr(), residual.data_ptr(), out.data_ptr()
        step.x_stride, step.rows, step.turn = x.stride(0), len(x), turn
        return Result(self._lib.iso_exchange_layer(self._handle, byref(bound.structure), byref(step))), out

    def layers(
        self, far: FarLayers, begin: int, x_TD: Tensor, rows: AttentionRows, turns: Sequence[int], budget: float
    ) -> tuple[Result, int, Tensor, Tensor]:
        """The layers from `begin` on; `turns` are theirs. No MoE layer begins after `budget` seconds. → what the last
        one came to, how many are whole, what the next one's rows are, or its residual where its attention is done, and
        then what its experts are to be given. x is written over. Raises IndexError."""
        where = self._kernels.bound.rows(rows, x_TD, far.hidden, far.rotary)
        h, other, step, to = torch.empty_like(x_TD), torch.empty_like(x_TD), self._step, self._far
        self._make_room(len(x_TD) * far.top_k)
        step.rows = len(x_TD)
        array = (_FarLayer * (len(far.layers) - begin)).from_buffer(far.array, begin * ctypes.sizeof(_FarLayer))
        for layer, turn in zip(array, turns, strict=True):
            layer.turn = turn
        to.rows, to.budget = ctypes.addressof(where.structure), int(budget * 1e9)
        to.to = DecoderRows(x_TD.data_ptr(), h.data_ptr(), other.data_ptr(), far.blocks, far.block_size, far.fp8)
        result = Result(self._lib.iso_exchange_layers(self._handle, array, len(array), byref(step), byref(to)))
        if result is Result.OUT_OF_CACHE:
            fail("attention", int(result), OUT_OF_CACHE.format(far.blocks))
        return result, to.at, other if to.at % 2 else x_TD, h

    def _make_room(self, pairs: int) -> None:
        if len(self._ids) < pairs:
            self._ids, self._weights = np.empty(2 * pairs, dtype=np.int32), np.empty(2 * pairs, dtype=np.float32)
            self._step.ids, self._step.weights = self._ids.ctypes.data, self._weights.ctypes.data

    def routed(self, rows: int, top_k: int) -> tuple[Tensor, Tensor]:
        """ids int32 and weights float32 [T, k] of the last call's rows: copies."""
        ids, weights = (a[: rows * top_k].reshape(rows, top_k).copy() for a in (self._ids, self._weights))
        return torch.from_numpy(ids), torch.from_numpy(weights)
