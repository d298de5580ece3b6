"""The shard's side of the expert exchange in one native call a layer, where every group is reached over a link whose
end is in native code. What fails there is left to exchange.py, which goes on from what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from isotherm.actors.attention.row_split import LayerTable
from isotherm.actors.links.protocol import Link, NativeLink
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.exchange import BoundLayer, LayerExperts, NativeExchange, Result
from isotherm.kernels.ops import Kernels, LinearWeight, Router

PATIENCE = 0.2  # seconds that a call waits for an answer, in which its thread gives no sign of life


@dataclass(frozen=True)
class Unfinished:
    """A layer that was routed, and whose rows may be on their way. `pairs_sent`: by group, how many outputs are to be
    received from it; 0: nothing was sent."""

    ids_Tk: Tensor  # int32
    weights_Tk: Tensor  # float32
    pairs_sent: list[int]


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
    ):
        self._kernels, self._links, self._locks = kernels, links, [link.in_use for link in links]
        self._version, self._tables, self._counters = version, tables, counters
        self._exchange = NativeExchange(kernels, ends, PATIENCE)
        self._bound: dict[int, BoundLayer] = {}

    @classmethod
    def over(
        cls,
        kernels: Kernels,
        links: Sequence[Link],
        version: int,
        tables: Mapping[int, LayerTable],
        counters: Mapping[int, tuple[np.ndarray, np.ndarray]],
    ) -> NativeLayers | None:
        """`counters`: rows routed and reads of each layer's experts, int64 [E]. None where kernels or links have no
        such way, or a link was closed."""
        native = [link for link in links if isinstance(link, NativeLink)]
        ends = [end for link in native if (end := link.end) is not None]
        if not isinstance(kernels, NativeKernels) or not links or len(ends) != len(links):
            return None
        return cls(kernels, native, ends, version, tables, counters)

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
        bound = self._bound.get(layer)
        if bound is None or bound.router is not router or bound.shared != shared:
            table = self._tables[layer]
            experts = LayerExperts(layer, self._version, table.copies, table.count, *self._counters[layer])
            bound = self._bound[layer] = self._exchange.bind(experts, router, *shared)
        for lock in self._locks:
            lock.acquire()
        try:
            if any(link.end is None for link in self._links):
                return Unfinished(*self._kernels.route(x_TD, router), [0] * len(self._links))
            result, out = self._exchange.layer(bound, x_TD, residual_TD, turn)
        finally:
            for lock in self._locks:
                lock.release()
        if result is Result.WHOLE:
            return out
        sent = self._exchange.pairs_sent.tolist()
        if result is Result.OUT_OF_MEMORY and not any(sent):
            raise MemoryError(f"layer {layer}: no memory for {len(x_TD)} rows")
        return Unfinished(*self._exchange.routed(len(x_TD), router.top_k), sent)

    def answered(self) -> list[int]:
        """The numbers of the groups that the last layer's rows went to."""
        numbers: list[int] = self._exchange.pairs_sent.nonzero()[0].tolist()
        return numbers

    def take_waits(self) -> list[int]:
        """Nanoseconds spent waiting for each group since this was asked last, once those before it had answered."""
        waits: list[int] = self._exchange.waited_ns.tolist()
        self._exchange.waited_ns[:] = 0
        return waits
