"""The shard's side of the expert exchange in native code, a layer or all of a step's in one call, where every group is
reached over a link whose end is in native code. What fails there is left to exchange.py, which goes on from what was
sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from isotherm.actors.attention.row_split import LayerTable
from isotherm.actors.links.protocol import Link, NativeLink
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.exchange import BoundLayer, FarLayers, LayerExperts, NativeExchange, Result
from isotherm.kernels.ops import AttentionRows, DecoderLayer, Kernels, LinearWeight, Router

PATIENCE = 0.2  # seconds that a call waits for an answer, in which its thread gives no sign of life
BUDGET = 0.05  # seconds after which a call begins no other MoE layer: its thread gives a sign of life, and goes on


@dataclass(frozen=True)
class Unfinished:
    """A layer that was routed, and whose rows may be on their way. `pairs_sent`: by group, how many outputs are to be
    received from it; 0: nothing was sent."""

    ids_Tk: Tensor  # int32
    weights_Tk: Tensor  # float32
    pairs_sent: list[int]


@dataclass(frozen=True)
class Advance:
    """How far a call for several layers has come. `at`: the layer that was not finished, whose attention gave `h_TD`
    and the residual `x_TD`, with what is under way of it, if anything is; or, without `h_TD`, the one after the last,
    with what goes into it."""

    at: int
    x_TD: Tensor
    h_TD: Tensor | None = None
    unfinished: Unfinished | None = None


class NativeLayers:
    """The layers of one placement over one set of links."""

    def __init__(
        self,
        kernels: NativeKernels,
        links: Sequence[NativeLink],
        ends: Sequence[int],
        version: int,
        tables: Mapping[int, LayerTable],
        counters: Mapping[int, tuple[np.ndarray, np.ndarray]],
        wanted: tuple[np.ndarray, np.ndarray],
    ):
        self._kernels, self._links, self._locks = kernels, links, [link.in_use for link in links]
        self._version, self._tables, self._counters = version, tables, counters
        self._exchange = NativeExchange(kernels, ends, PATIENCE, wanted)
        self._bound: dict[int, BoundLayer] = {}
        self._far: dict[int, FarLayers] = {}  # by the number of the first layer

    @classmethod
    def over(
        cls,
        kernels: Kernels,
        links: Sequence[Link],
        version: int,
        tables: Mapping[int, LayerTable],
        counters: Mapping[int, tuple[np.ndarray, np.ndarray]],
        wanted: tuple[np.ndarray, np.ndarray],
    ) -> NativeLayers | None:
        """`counters`: rows routed and reads of each layer's experts, int64 [E]. `wanted`: int32 [1] each; a call for
        several layers ends at the next MoE layer once one of them is not 0. None where kernels or links have no
        such way, or a link was closed."""
        native = [link for link in links if isinstance(link, NativeLink)]
        ends = [end for link in native if (end := link.end) is not None]
        if not isinstance(kernels, NativeKernels) or not links or len(ends) != len(links):
            return None
        return cls(kernels, native, ends, version, tables, counters, wanted)

    def moe(
        self,
        layer: int,
        x_TD: Tensor,
        router: Router,
        shared: tuple[LinearWeight | None, LinearWeight | None],
        residual_TD: Tensor,
        turn: int,
    ) -> Tensor | Unfinished:
        """As ExpertExchange.moe, where every group answers in time. Raises MemoryError."""
        bound = self._bind(layer, router, shared)
        for lock in self._locks:
            lock.acquire()
        try:
            if any(link.end is None for link in self._links):
                return Unfinished(*self._kernels.route(x_TD, router), [0] * len(self._links))
            result, out = self._exchange.layer(bound, x_TD, residual_TD, turn)
        finally:
            for lock in self._locks:
                lock.release()
        return out if result is Result.WHOLE else self._unfinished(layer, len(x_TD), router, result)

    def _bind(self, layer: int, router: Router, shared: tuple[LinearWeight | None, LinearWeight | None]) -> BoundLayer:
        bound = self._bound.get(layer)
        if bound is None or bound.router is not router or bound.shared != shared:
            table = self._tables[layer]
            experts = LayerExperts(layer, self._version, table.copies, table.count, *self._counters[layer])
            bound = self._bound[layer] = self._exchange.bind(experts, router, *shared)
        return bound

    def _unfinished(self, layer: int, rows: int, router: Router, result: Result) -> Unfinished:
        sent = self._exchange.pairs_sent.tolist()
        if result is Result.OUT_OF_MEMORY and not any(sent):
            raise MemoryError(f"layer {layer}: no memory for {rows} rows")
        return Unfinished(*self._exchange.routed(rows, router.top_k), sent)

    def advance(
        self,
        layers: Sequence[DecoderLayer],
        first: int,
        begin: int,
        x_TD: Tensor,
        rows: AttentionRows,
        caches: Sequence[Tensor],
        turns: dict[int, int],
    ) -> Advance | None:
        """The layers from `begin` on, of which the first of all has the number `first`, as long as every group answers
        in time and the caller is not wanted. `turns`: the last one of each layer, counted up where rows were sent. None
        where a link was closed. Raises MemoryError, IndexError."""
        far = self._far.get(first)
        if far is None or not far.fits(layers, caches):
            moes = [
                None if layer.router is None else self._bind(number, layer.router, (layer.gate_up, layer.down))
                for number, layer in enumerate(layers, first)
            ]
            far = self._far[first] = FarLayers(self._kernels, layers, moes, caches)
        due = [turns.get(number, number) + 1 for number in range(first + begin, first + len(layers))]
        for lock in self._locks:
            lock.acquire()
        try:
            if any(link.end is None for link in self._links):
                return None
            result, done, x_TD, h_TD = self._exchange.layers(far, begin, x_TD, rows, due, BUDGET)
        finally:
            for lock in self._locks:
                lock.release()
        at = begin + done
        sent = at if result in (Result.WHOLE, Result.GIVEN_UP) else at + 1
        turns |= {first + i: due[i - begin] for i in range(begin, sent) if layers[i].router is not None}
        if result is Result.WHOLE or result is Result.GIVEN_UP:
            return Advance(at, x_TD, None if result is Result.WHOLE else h_TD)
        router = layers[at].router
        if router is None:
            raise MemoryError(f"layer {first + at}: no memory for {len(x_TD)} rows")
        return Advance(at, x_TD, h_TD, self._unfinished(first + at, len(x_TD), router, result))

    def answered(self) -> list[int]:
        """The numbers of the groups that the last layer's rows went to."""
        numbers: list[int] = self._exchange.pairs_sent.nonzero()[0].tolist()
        return numbers

    def take_waits(self) -> list[int]:
        """Nanoseconds spent waiting for each group since this was asked last, once those before it had answered."""
        waits: list[int] = self._exchange.waited_ns.tolist()
        self._exchange.waited_ns[:] = 0
        return waits

    def take_longest(self) -> float:
        """Seconds of the longest wait for one answer since this was asked last."""
        longest = 1e-9 * self._exchange.longest_ns.item()
        self._exchange.longest_ns[:] = 0
        return longest
