"""DeepSeek-V3.2's indexer (arXiv:2512.02556, §2.1): which positions a row attends to once there are more of them than
`topk`.

The published code rotates queries and keys by a Hadamard matrix and rounds both to FP8; the one leaves their products
as they are, the other is not done here (nor in transformers' class). Shape suffixes as in kernels/ops.py, and here G
the heads of the indexer, E the width of its keys, L positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.deepseek_v32 import DeepseekV32Config
from isotherm.kernels.ops import AttentionRows, Kernels, LinearWeight

KEY_NORM_EPS = 1e-6
MOST_PRODUCTS = 1 << 23  # of queries and keys at once: 64 MiB


@dataclass(frozen=True)
class Indexer:
    """One layer's, packed."""

    kernels: Kernels
    query: LinearWeight  # latent of the queries → [G × E]
    key: LinearWeight  # D → E
    key_norm: Tensor  # float32 [E]
    key_bias: Tensor  # float32 [E]
    head_weight: LinearWeight  # D → G
    heads: int
    rotary: int
    topk: int

    @classmethod
    def load(cls, c: DeepseekV32Config, kernels: Kernels, reader: WeightReader, layer: str) -> Indexer:
        p = f"{layer}.self_attn.indexer"
        query, key, head_weight = (
            kernels.pack_linear([reader.stored(f"{p}.{name}.weight")]) for name in ("wq_b", "wk", "weights_proj")
        )
        norm, bias = (
            reader.tensor(f"{p}.k_norm.{name}").to(kernels.device, torch.float32, copy=True)
            for name in ("weight", "bias")
        )
        return cls(
            kernels, query, key, norm, bias, head_weight, c.index_n_heads, c.qk_rope_head_dim, c.index_topk
        )  # fmt: skip

    def write_keys(self, h_TD: Tensor, rows: AttentionRows, keys: Tensor) -> None:
        """The rows' keys into their cache, [blocks, block_size, E]."""
        k_TE = F.layer_norm(
            self.kernels.linear(h_TD, self.key, torch.float32), self.key_norm.shape, self.key_norm, self.key_bias,
            KEY_NORM_EPS,
        )  # fmt: skip
        k_TE = self._rotated(k_TE.to(self.kernels.dtype)[:, None], rows.cos_TR2, rows.sin_TR2)[:, 0]
        keys.view(-1, keys.shape[-1])[rows.cache_slots] = k_TE

    def choose(
        self,
        h_ND: Tensor,
        source_NK: Tensor,
        cos_NR2: Tensor,
        sin_NR2: Tensor,
        lengths_N: Tensor,
        keys_LE: Tensor,
    ) -> Iterator[tuple[slice, Tensor]]:
        """For N rows of one sequence, each of which sees more positions than `topk`: some of the rows, and for each of
        them the positions with the highest scores, int64 [n, topk] in ascending order. Of equal scores the earlier
        position wins."""
        q_NGE = self.kernels.linear(source_NK, self.query).unflatten(-1, (self.heads, -1))
        q_NGE = self._rotated(q_NGE, cos_NR2, sin_NR2)
        w_NG = self.kernels.linear(h_ND, self.head_weight, torch.float32) * self.heads**-0.5
        length, at_once = len(keys_LE), max(1, MOST_PRODUCTS // (self.heads * len(keys_LE)))
        where_L, keys_EL = torch.arange(length, device=keys_LE.device), keys_LE.double().T
        for first in range(0, len(q_NGE), at_once):
            some = slice(first, first + at_once)
            scores_nL = self._scores(q_NGE[some], w_NG[some], keys_EL)
            scores_nL.masked_fill_(where_L[None] >= lengths_N[some, None], -torch.inf)
            order = scores_nL.sort(dim=-1, descending=True, stable=True).indices
            yield some, order[:, : self.topk].sort(dim=-1).values

    def _scores(self, q_nGE: Tensor, w_nG: Tensor, keys_EL: Tensor) -> Tensor:
        """Σ_heads weight × ReLU(query · key) → float32 [n, L]. Products are summed in float64, of which rounding leaves
        no trace of the order, and heads one after another: so the scores of a row do not depend on other rows."""
        products_nGL = (q_nGE.double() @ keys_EL).float().mul_(keys_EL.shape[0] ** -0.5).relu_()
        total_nL = torch.zeros_like(products_nGL[:, 0])
        for head in range(self.heads):
            total_nL += products_nGL[:, head] * w_nG[:, head, None]
        return total_nL

    def _rotated(self, x_NGE: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
        """The first R dimensions rotated, of which dimension i and i + R/2 are a pair: put side by side, as the kernels
        have them. Queries and keys stay in that order, which their products do not see."""
        rotary, rest = x_NGE[..., : self.rotary], x_NGE[..., self.rotary :]
        paired = rotary.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2).contiguous()
        return torch.cat([self.kernels.rope(paired, cos_NR2, sin_NR2), rest], -1)
