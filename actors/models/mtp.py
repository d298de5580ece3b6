"""The layer that predicts a token beyond the next one (DeepSeek-V3, arXiv:2412.19437, §2.2): an embedding and a hidden
state become one, go through a decoder layer of its own, with routed experts or without, and are what the head reads.

The hidden state is the main model's after its final norm, and where the layer is applied again its own after
`shared_head.norm`: what `hnorm` was trained on. Shape suffixes as in kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from isotherm.actors.models.decoder import Decoder, Layer
from isotherm.actors.models.protocol import RoutedExperts
from isotherm.kernels.cache_rows import new_layer_cache
from isotherm.kernels.ops import AttentionRows, DraftLayer, Kernels, LinearWeight


@dataclass(frozen=True)
class MtpLayer:
    """`number`: the layer that its experts have in placements. `main_norm`: the main model's final norm. `layer` is
    dense in JoyAI's models."""

    kernels: Kernels
    number: int
    eps: float
    main_norm: Tensor  # [D]
    embedding: Tensor  # [V, D]
    enorm: Tensor  # [D]
    hnorm: Tensor  # [D]
    eh_proj: LinearWeight  # [embedding | hidden] → D
    layer: Layer  # with experts, or dense
    norm: Tensor  # [D], before the head
    head: LinearWeight
    fp8_cache: bool
    cos: Tensor  # float32 [positions, R/2], the main model's
    sin: Tensor

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder([self.layer], self.number)

    def new_cache(self, blocks: int, block_size: int) -> Tensor:
        """Zeroed; kept as the main model's is."""
        a, k = self.layer.attention, self.kernels
        return new_layer_cache(blocks, block_size, a.latent, a.rotary, k.dtype, k.device, self.fp8_cache)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What `forward` takes of what the main model's forward pass gives."""
        return self.kernels.rms_norm(x_TD, self.main_norm, self.eps)

    def whole(self, experts: RoutedExperts) -> DraftLayer | None:
        """As Kernels.draft takes it; None where its experts are elsewhere."""
        together = self._decoder.together(experts)
        if together is None:
            return None
        (layer,) = together
        return DraftLayer(
            self.main_norm, self.embedding, self.enorm, self.hnorm, self.eh_proj, layer, self.norm, self.head, self.eps,
            self.cos, self.sin,
        )  # fmt: skip

    def forward(
        self, hidden_TD: Tensor, token_ids_T: Tensor, rows: AttentionRows, cache: Tensor, experts: RoutedExperts
    ) -> Tensor:
        """The hidden state of each position and the token after it → the hidden state [T, D] that tells the token after
        that; writes the rows' latents into the layer's cache."""
        k = self.kernels
        x_TD = k.linear(
            torch.cat(
                [
                    k.rms_norm(self.embedding[token_ids_T], self.enorm, self.eps),
                    k.rms_norm(hidden_TD, self.hnorm, self.eps),
                ],
                -1,
            ),
            self.eh_proj,
        )
        x_TD = self._decoder.forward(k, x_TD, rows, [cache], experts)
        return k.rms_norm(x_TD, self.norm, self.eps)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 [N, V], of what `forward` gave."""
        return self.kernels.linear(hidden_ND, self.head, torch.float32)
