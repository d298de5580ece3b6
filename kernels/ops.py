"""The operations that a DeepSeek-V3 forward pass is made of, as one abstract class with a backend per device.

`kernels/reference.py` is the definition of correct; other backends must agree with it within the tolerance of their dtype. Model code
calls these methods and never branches on the device.

Shape suffixes: T rows (tokens) of a step, D hidden size, N/K output/input features, H attention heads, C `kv_lora_rank`, R
`qk_rope_head_dim`, P (row, expert) pairs, k experts per token, E experts, S sequences, M blocks in the longest block table, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # FP8 checkpoints carry one float32 scale per BLOCK×BLOCK tile of a weight


@dataclass(frozen=True)
class StoredWeight:
    """A matrix as the checkpoint stores it: `data` [N, K] in bf16, fp16, fp32 or float8_e4m3fn, the last with `scale_inv`
    float32 [ceil(N/128), ceil(K/128)] (dequantised weight = data × scale of its block)."""

    data: Tensor
    scale_inv: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale_inv is None else self.scale_inv.nbytes)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`; block scales are applied in float32."""
        if self.scale_inv is None:
            return self.data.to(dtype)
        rows, columns = self.data.shape
        scale = self.scale_inv.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (self.data.float() * scale).to(dtype)


@dataclass(frozen=True)
class LinearWeight:
    """A packed projection: `data` is the backend's own; `bias` [N] is added in float32 before rounding."""

    out_features: int
    in_features: int
    data: Any
    bias: Tensor | None
    nbytes: int


@dataclass(frozen=True)
class Router:
    """The gate of one MoE layer. `weight` float32 [E, D]; `bias` float32 [E], the load-balancing correction, used to choose experts only."""

    weight: Tensor
    bias: Tensor
    n_group: int
    topk_group: int
    top_k: int
    normalise: bool
    scaling: float


class ExpertBank(ABC):
    """The routed experts that one worker holds, in numbered slots that can be filled and emptied while the worker runs.

    All slots have one shape: gate and up [inner, hidden], down [hidden, inner]. An empty slot holds no weight memory.
    """

    @abstractmethod
    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        """Pack one expert into `slot` (0 ≤ slot < slots), replacing what was there."""

    @abstractmethod
    def drop(self, slot: int) -> None:
        """Free the slot's memory; later use of it without a load is an error."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of packed weights held now."""


class Kernels(ABC):
    """One backend. `dtype` (bfloat16 or float32) is what activations are kept in between operations; `device`, where."""

    name: str
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    # --- weights ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def pack_linear(self, weights: list[StoredWeight], bias: Tensor | None = None) -> LinearWeight:
        """Pack projections that share an input into one weight; their outputs stand side by side in the given order."""

    @abstractmethod
    def pack_heads(self, weight_HNK: Tensor) -> Any:
        """Pack one small matrix per attention head, for `head_linear`."""

    @abstractmethod
    def expert_bank(self, slots: int, hidden: int, inner: int) -> ExpertBank:
        """An empty bank."""

    # --- dense operations ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) × weight, the normalisation in float32, rounded to dtype before the weight (as transformers does)."""

    @abstractmethod
    def linear(self, x_TK: Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        """x @ weightᵀ (+ bias) → [T, N] in `dtype`, or in `out_dtype`. Sums in float32."""

    @abstractmethod
    def head_linear(self, x_THK: Tensor, weight: Any) -> Tensor:
        """Per head x[:, h] @ weight[h]ᵀ → [T, H, N] in `dtype`."""

    @abstractmethod
    def mlp(self, x_TD: Tensor, gate_up: LinearWeight, down: LinearWeight) -> Tensor:
        """down(SiLU(gate(x)) × up(x)) → [T, D]; `gate_up` packs gate and up in this order."""

    @abstractmethod
    def rope(self, x_THR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
        """Rotate interleaved pairs (x[2i], x[2i+1]), the original formula of RoFormer (arXiv:2104.09864, eq. 34). cos, sin float32 [T, R/2]."""

    # --- experts ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def route(self, x_TD: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        """Group-limited top-k of sigmoid scores (DeepSeek-V3, arXiv:2412.19437, §2.1.2) → expert ids int32 [T, k], ascending in each row,
        and weights float32 [T, k]. Equal scores go to the lower id."""

    @abstractmethod
    def experts(self, x_TD: Tensor, bank: ExpertBank, rows_P: Tensor, slots_A: Tensor, offsets_A1: Tensor) -> Tensor:
        """Unweighted outputs, one per (row, expert) pair → [P, D] in `dtype`.

        Pairs are sorted by expert: pairs offsets[a] … offsets[a+1]-1 use the expert in slots[a], and pair p reads row x[rows[p]].
        rows int32 [P], slots int32 [A] (distinct), offsets int32 [A+1] from 0 to P.
        """

    @abstractmethod
    def combine(self, y_PD: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Σ_j weights[t, j] × y[index[t, j]] → [T, D] in `dtype`, summed in float32 in the order of j (so ascending expert id)."""

    # --- attention -------------------------------------------------------------------------------------------------------------------
    # The paged cache of one layer is [blocks, block_size, C + R] in `dtype`: per token its normalised latent, then its rotated key.

    @abstractmethod
    def write_cache(self, latent_TC: Tensor, k_rope_TR: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        """Store each token's latent and rotary key at slot = block × block_size + offset (int64 [T])."""

    @abstractmethod
    def mla_prefill(self, q_THQ: Tensor, cache: Tensor, block_table_M: Tensor, start: int, kv_b: LinearWeight, v_head_dim: int,
                    scale: float) -> Tensor:
        """Attention in expanded form for T consecutive positions start … start+T-1 of one sequence, whose latents up to start+T-1 are
        already in the cache → [T, H × v_head_dim] in `dtype`.

        q [T, H, nope + R], the rotary part rotated and last. kv_b expands a latent to [H × (nope + v_head_dim)]. block_table int32 [M].
        """

    @abstractmethod
    def mla_decode(self, q_latent_THC: Tensor, q_rope_THR: Tensor, cache: Tensor, block_tables_SM: Tensor, sequence_T: Tensor, lengths_T: Tensor,
                   scale: float) -> Tensor:
        """Attention in absorbed form → latent outputs [T, H, C] in `dtype`. Row t attends to the first lengths[t] positions of sequence
        sequence[t] (a row of block_tables); several rows may belong to one sequence. All indices int32."""

    # --- sampling --------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def sample(self, logits_TV: Tensor, temperature_T: Tensor, top_p_T: Tensor, top_k_T: Tensor, seed_T: Tensor, index_T: Tensor) -> Tensor:
        """Token ids int64 [T]. logits float32; temperature, top_p float64; top_k int64 (0: off); seed, index int64.

        Temperature 0 takes the largest logit (the lowest id of equal ones). Otherwise the largest of logit/temperature + Gumbel noise among
        the tokens that top-k, then top-p (the smallest set of most likely tokens that reaches p) leave. The noise is a hash of (seed, index,
        token id) alone: see `gumbel_noise` in kernels/reference.py.
        """
