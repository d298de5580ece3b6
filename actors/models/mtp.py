"""The layer that predicts a token beyond the next one (DeepSeek-V3, arXiv:2412.19437, §2.2): an embedding and a hidden
state become one, go through a decoder layer of its own, with routed experts or without, and are what the head reads.

The hidden state is the main model's after its final norm, and where the layer is applied again its own after
`shared_head.norm`: what `hnorm` was trained on. Shape suffixes as in kernels/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.actors.models.protocol import RoutedExperts
from isotherm.kernels.cache_rows import new_layer_cache
from isotherm.kernels.ops import AttentionRows, AttentionWeights, Kernels, LinearWeight, Router


@dataclass(frozen=True)
class MtpLayer:
    """`number`: the layer that its experts have in placements. `main_norm`: the main model's final norm. `router` is
    None where the layer is dense, as JoyAI's is."""

    kernels: Kernels
    number: int
    eps: float
    main_norm: Tensor  # [D]
    embedding: Tensor  # [V, D]
    enorm: Tensor  # [D]
    hnorm: Tensor  # [D]
    eh_proj: LinearWeight  # [embedding | hidden] → D
    attention: AttentionWeights
    router: Router | None
    gate_up: LinearWeight | None  # of the dense MLP, or of the shared experts
    down: LinearWeight | None
    norm: Tensor  # [D], before the head
    head: LinearWeight
    fp8_cache: bool

    def new_cache(self, blocks: int, block_size: int) -> Tensor:
        """Zeroed; kept as the main model's is."""
        a, k = self.attention, self.kernels
        return new_layer_cache(blocks, block_size, a.latent, a.rotary, k.dtype, k.device, self.fp8_cache)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What `forward` takes of what the main model's forward pass gives."""
        return self.kernels.rms_norm(x_TD, self.main_norm, self.eps)

    @torch.inference_mode()
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
        h_TD = k.attention(x_TD, self.attention, rows, cache)
        if self.router is not None:
            x_TD = experts.moe(self.number, h_TD, self.router, self.gate_up, self.down, x_TD)
        else:
            assert self.gate_up is not None and self.down is not None
            x_TD += k.mlp(h_TD, self.gate_up, self.down)
        return k.rms_norm(x_TD, self.norm, self.eps)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 [N, V], of what `forward` gave."""
        return self.kernels.linear(hidden_ND, self.head, torch.float32)
