"""Decoder layers one after another, their routed experts wherever they are. Shape suffixes as in kernels/ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from isotherm.actors.models.protocol import RoutedExperts
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.ops import AttentionRows, AttentionWeights, DecoderLayer, Kernels, LinearWeight, Router


@dataclass(frozen=True)
class Mlp:
    gate_up: LinearWeight
    down: LinearWeight


@dataclass(frozen=True)
class Layer:
    attention: AttentionWeights
    mlp: Mlp | None  # the dense MLP, or the shared experts; None where a MoE layer has no shared experts
    router: Router | None  # None: a dense layer

    @property
    def own(self) -> tuple[LinearWeight, LinearWeight] | tuple[None, None]:
        """gate_up and down of its MLP."""
        return (None, None) if self.mlp is None else (self.mlp.gate_up, self.mlp.down)

    def bare(self) -> DecoderLayer:
        """Without its routed experts."""
        gate_up, down = self.own
        return DecoderLayer(self.attention, gate_up, down, self.router)


class Decoder:
    """`first`: the number that the first layer has in placements."""

    attends_plainly = True  # `attend` is Kernels.attention

    def __init__(self, layers: Sequence[Layer], first: int = 0):
        self.layers, self._first = layers, first
        self._seen: tuple[RoutedExperts, Sequence[DecoderLayer] | None] | None = None
        self._plain = [layer.bare() for layer in layers]

    def forward(
        self, kernels: Kernels, x_TD: Tensor, rows: AttentionRows, caches: Sequence[Tensor], experts: RoutedExperts
    ) -> Tensor:
        """The last layer's output; writes the rows' latents into the caches, and over x."""
        together = self.together(experts)
        if together is not None:
            return kernels.decoder(x_TD, together, rows, caches)
        i = 0
        while i < len(self.layers):
            gone = experts.advance(self._plain, self._first, i, x_TD, rows, caches) if self.attends_plainly else None
            if gone is not None:
                i, x_TD = gone
                continue
            layer = self.layers[i]
            h_TD = self.attend(kernels, i, x_TD, rows, caches)
            gate_up, down = layer.own
            if layer.router is not None:
                x_TD = experts.moe(self._first + i, h_TD, layer.router, gate_up, down, x_TD)
            else:
                assert gate_up is not None and down is not None
                x_TD += kernels.mlp(h_TD, gate_up, down)
            i += 1
        return x_TD

    def attend(self, kernels: Kernels, i: int, x_TD: Tensor, rows: AttentionRows, caches: Sequence[Tensor]) -> Tensor:
        """The attention of layer `i`, as Kernels.attention says it."""
        return kernels.attention(x_TD, self.layers[i].attention, rows, caches[i])

    def together(self, experts: RoutedExperts) -> Sequence[DecoderLayer] | None:
        """All layers, where nothing has to be sent between them."""
        if self._seen is None or self._seen[0] is not experts:
            layers = [self._whole(layer, experts.bank_of(self._first + i)) for i, layer in enumerate(self.layers)]
            self._seen = experts, None if None in layers else [layer for layer in layers if layer is not None]
        return self._seen[1]

    def _whole(self, layer: Layer, held: tuple[ExpertBank, Tensor] | None) -> DecoderLayer | None:
        gate_up, down = layer.own
        if layer.router is None:
            return DecoderLayer(layer.attention, gate_up, down)
        return None if held is None else DecoderLayer(layer.attention, gate_up, down, layer.router, *held)
