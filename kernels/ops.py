"""The operations that a DeepSeek-V3 forward pass is made of, as one abstract class with a backend per device.

`kernels/reference.py` is the definition of correct; other backends must agree with it within the tolerance of their
dtype. Model code calls these methods and never branches on the device.

Shape suffixes: T rows (tokens) of a step, D hidden size, N/K output/input features, H attention heads, C
`kv_lora_rank`, R `qk_rope_head_dim`, P (row, expert) pairs, k experts per token, E experts, S sequences, M blocks in
the longest block table, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.stored import StoredWeight


@dataclass(frozen=True)
class LinearWeight:
    """A packed projection: `data` is the backend's own; `bias` [N] is added in float32 before rounding."""

    out_features: int
    in_features: int
    data: Any
    bias: Tensor | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class Router:
    """The gate of one MoE layer. `weight` float32, or bfloat16 to be computed with in float32, [E, D]; `bias` float32
    [E], the load-balancing correction, used to choose experts only."""

    weight: Tensor
    bias: Tensor
    n_group: int
    topk_group: int
    top_k: int
    normalise: bool
    scaling: float


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One layer's multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1), packed, with the norms
    around it."""

    norm: Tensor  # [D], before the attention
    post_norm: Tensor  # [D], of the sum of residual and attention
    eps: float  # of these two
    latent_eps: float  # of q_norm and kv_norm
    input: LinearWeight  # D → [queries, or their latent | C | R]
    q_norm: Tensor | None  # None, and q_b too: `input` gives the queries themselves
    q_b: LinearWeight | None  # → [H × (nope + R)]
    kv_norm: Tensor  # [C]
    kv_b: LinearWeight  # C → [H × (nope + v)]: prefill form
    k_absorb: Any  # per head nope → C, q_nope → latent query: decode form
    v_absorb: Any  # per head C → v, latent output → value
    o: LinearWeight  # [H × v] → D
    heads: int
    nope: int
    rotary: int
    latent: int
    value: int
    scale: float  # of the scores


@dataclass(frozen=True, eq=False)
class PrefillRows:
    """Rows first … first+count-1 of a step are positions start … of one sequence."""

    first: int
    count: int
    start: int
    block_table: Tensor  # int32 [M]


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Where a step's T rows stand in their sequences: `decodes` rows in decode form first, then the prefill chunks."""

    cos_TR2: Tensor  # float32, of each row's position
    sin_TR2: Tensor
    cache_slots: Tensor  # int64 [T]: block × block_size + offset, where the row's latent is written
    decodes: int
    decode_tables: Tensor  # int32 [S, M]
    decode_sequence: Tensor  # int32 [decodes]: row of decode_tables
    decode_lengths: Tensor  # int32 [decodes]: how many positions the row attends to
    prefills: tuple[PrefillRows, ...]


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A decoder layer. Where it has a router, its routed experts are all in one bank of this process; without a bank,
    elsewhere."""

    attention: AttentionWeights
    gate_up: LinearWeight | None  # of the dense MLP, or of the shared experts
    down: LinearWeight | None
    router: Router | None = None
    bank: ExpertBank | None = None
    slot_of_E: Tensor | None = None  # int32: where each expert is in the bank


@dataclass(frozen=True, eq=False)
class DraftLayer:
    """A layer that guesses tokens (DeepSeek-V3, arXiv:2412.19437, §2.2), all of it in this process."""

    main_norm: Tensor  # [D], the main model's last norm
    embedding: Tensor  # [V, D]
    enorm: Tensor  # [D]
    hnorm: Tensor  # [D]
    eh_proj: LinearWeight  # [embedding | hidden] → D
    layer: DecoderLayer
    norm: Tensor  # [D], before the head
    head: LinearWeight
    eps: float
    cos: Tensor  # float32 [positions, R/2]
    sin: Tensor


class DraftStream(NamedTuple):
    """What is asked for one stream: tokens that may follow the last of `tokens`."""

    blocks: Sequence[int]  # its block table; keys before block `skipped` are not looked at
    skipped: int
    start: int  # positions from here on have these tokens after them, and the layer has not had them
    tokens: Sequence[int]
    expanded: bool  # in prefill form; such streams come last
    hidden: Sequence[tuple[Tensor, int, int]]  # the main model's output for these positions: of x [T, D], row i, n rows
    guesses: int  # at least 1
    temperature: float  # 0: the likeliest token; else it is drawn as `sample` says it
    top_p: float
    top_k: int
    seed: int
    place: int  # of the first guess among the request's output tokens: `sample`'s index


class Kernels(ABC):
    """One backend. `dtype` (bfloat16 or float32) is what activations are kept in between operations;
    `device`, where."""

    name: str
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    # Version of the order in which this backend adds up. Raise it with whatever changes a bit of a result: it is part
    # of the fingerprint that keeps workers of different versions out of one cluster (tests/kernels/test_summation.py
    # tells when it was forgotten).
    summation: int = 1
    # What else decides a result's last bit: the instruction set, and the library where the order is a library's.
    instructions: str

    # --- weights ----------------------------------------------------------------------------------

    @abstractmethod
    def pack_linear(self, weights: list[StoredWeight], bias: Tensor | None = None) -> LinearWeight:
        """Pack projections that share an input into one weight; their outputs stand side by side in the given order."""

    @abstractmethod
    def pack_heads(self, weights: list[StoredWeight]) -> Any:
        """Pack one small matrix [N, K] per attention head, all of one shape, for `head_linear`."""

    @abstractmethod
    def expert_bank(self, slots: int, hidden: int, inner: int) -> ExpertBank:
        """An empty bank."""

    # --- dense operations -------------------------------------------------------------------------

    @abstractmethod
    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) × weight, the normalisation in float32, rounded to dtype before the weight (as
        transformers does)."""

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """residual += x in place, rounded to dtype; → rms_norm(residual)."""
        residual_TD += x_TD
        return self.rms_norm(residual_TD, weight_D, eps)

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
        """Rotate interleaved pairs (x[2i], x[2i+1]), the original formula of RoFormer (arXiv:2104.09864, eq. 34). cos,
        sin float32 [T, R/2]."""

    # --- experts ----------------------------------------------------------------------------------

    @abstractmethod
    def route(self, x_TD: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        """Group-limited top-k of sigmoid scores (DeepSeek-V3, arXiv:2412.19437, §2.1.2) → expert ids int32 [T, k],
        ascending in each row, and weights float32 [T, k]. Equal scores go to the lower id."""

    @abstractmethod
    def experts(self, x_TD: Tensor, bank: ExpertBank, rows_P: Tensor, slots_A: Tensor, offsets_A1: Tensor) -> Tensor:
        """Unweighted outputs, one per (row, expert) pair → [P, D] in `dtype`.

        Pairs are sorted by expert: pairs offsets[a] … offsets[a+1]-1 use the expert in slots[a], and pair p reads row
        x[rows[p]]. rows int32 [P], slots int32 [A] (distinct), offsets int32 [A+1] from 0 to P.
        """

    @abstractmethod
    def combine(
        self,
        y_PD: Tensor,
        index_Tk: Tensor,
        weights_Tk: Tensor,
        own_TD: Tensor | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        """Σ_j weights[t, j] × y[index[t, j]] → [T, D] in `dtype`, summed in float32 in the order of j (so ascending
        expert id).

        `own` (the shared experts' output), then `residual`, are added to the rounded sum, each sum rounded again.
        """

    def moe(
        self,
        x_TD: Tensor,
        router: Router,
        bank: ExpertBank,
        slot_of_E: Tensor,
        gate_up: LinearWeight | None,
        down: LinearWeight | None,
        residual_TD: Tensor,
    ) -> Tensor:
        """A MoE layer with every expert e in `bank`, at slot_of[e] (int32), and shared experts if any → residual + (Σ
        weight × expert + shared).

        What it is made of is said here; a backend may do it in one piece, to the same bits as its own operations give.
        """
        ids_Tk, weights_Tk = self.route(x_TD, router)
        order_P = ids_Tk.flatten().argsort(stable=True)
        experts_A, counts_A = ids_Tk.flatten()[order_P].unique_consecutive(return_counts=True)
        offsets_A1 = torch.nn.functional.pad(counts_A.cumsum(0), (1, 0)).int()
        y_PD = self.experts(x_TD, bank, (order_P // ids_Tk.shape[1]).int(), slot_of_E[experts_A.long()], offsets_A1)
        index_P = torch.empty_like(order_P)
        index_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        own_TD = None if gate_up is None or down is None else self.mlp(x_TD, gate_up, down)
        return self.combine(y_PD, index_P.view(ids_Tk.shape), weights_Tk, own_TD, residual_TD)

    # --- attention --------------------------------------------------------------------------------
    # The paged cache of one layer is [blocks, block_size, C + R] in `dtype`: per token its normalised latent, then its
    # rotated key. Or it is uint8, and each token's row is what kernels/cache_rows.py makes of these two: the latent is
    # rounded when it is written, and every form of attention reads the rounded one, also of its own rows. Where in a
    # block the parts of such a row lie is the backend's own.

    @abstractmethod
    def write_cache(self, latent_TC: Tensor, k_rope_TR: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        """Store each token's latent and rotary key at slot = block × block_size + offset (int64 [T])."""

    def gather(self, cache: Tensor, slots_NK: Tensor, latent: int) -> Tensor:
        """The tokens of a layer's cache in these slots (int64), as a cache of N blocks of K tokens. `latent`: C."""
        return cache.flatten(0, 1)[slots_NK]

    @abstractmethod
    def mla_prefill(
        self,
        q_THQ: Tensor,
        cache: Tensor,
        block_table_M: Tensor,
        start: int,
        kv_b: LinearWeight,
        v_head_dim: int,
        scale: float,
    ) -> Tensor:
        """Attention in expanded form for T consecutive positions start … start+T-1 of one sequence, whose latents up to
        start+T-1 are already in the cache → [T, H × v_head_dim] in `dtype`.

        q [T, H, nope + R], the rotary part rotated and last. kv_b expands a latent to [H × (nope + v_head_dim)].
        block_table int32 [M].
        """

    @abstractmethod
    def mla_decode(
        self,
        q_latent_THC: Tensor,
        q_rope_THR: Tensor,
        cache: Tensor,
        block_tables_SM: Tensor,
        sequence_T: Tensor,
        lengths_T: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention in absorbed form → latent outputs [T, H, C] in `dtype`. Row t attends to the first lengths[t]
        positions of sequence sequence[t] (a row of block_tables); several rows may belong to one sequence. All indices
        int32."""

    def project(
        self, h_TD: Tensor, a: AttentionWeights, rows: AttentionRows, cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first half of `attention`, from the normalised input: writes the rows' latents and rotated keys into the
        cache. → the queries, [T, H, nope] and the rotated [T, H, R], and what they were made of: their normalised
        latent, or themselves."""
        q_TK, latent, k_rope = self.linear(h_TD, a.input).split(
            [a.input.out_features - a.latent - a.rotary, a.latent, a.rotary], -1
        )
        source_TK = q_TK
        if a.q_b is not None:
            assert a.q_norm is not None
            source_TK = self.rms_norm(q_TK, a.q_norm, a.latent_eps)
            q_TK = self.linear(source_TK, a.q_b)
        q_nope, q_rope = q_TK.unflatten(-1, (a.heads, -1)).split([a.nope, a.rotary], -1)
        q_rope = self.rope(q_rope, rows.cos_TR2, rows.sin_TR2)
        k_rope = self.rope(k_rope[:, None], rows.cos_TR2, rows.sin_TR2)[:, 0]
        self.write_cache(self.rms_norm(latent, a.kv_norm, a.latent_eps), k_rope, cache, rows.cache_slots)
        return q_nope, q_rope, source_TK

    def attention(self, x_TD: Tensor, a: AttentionWeights, rows: AttentionRows, cache: Tensor) -> Tensor:
        """A layer's attention: x += attention(rms_norm(x)) in place; → rms_norm(x) with `post_norm`. Writes the rows'
        latents into the cache.

        What it is made of is said here; a backend may do it in one piece, to the same bits as its own operations give.
        """
        n = rows.decodes
        q_nope, q_rope, _ = self.project(self.rms_norm(x_TD, a.norm, a.eps), a, rows, cache)
        out_TX = torch.empty(len(x_TD), a.heads * a.value, dtype=self.dtype, device=x_TD.device)
        if n:
            q_latent = self.head_linear(q_nope[:n], a.k_absorb)
            out_latent = self.mla_decode(
                q_latent, q_rope[:n], cache, rows.decode_tables, rows.decode_sequence, rows.decode_lengths, a.scale
            )
            out_TX[:n] = self.head_linear(out_latent, a.v_absorb).flatten(1)
        for chunk in rows.prefills:
            mine = slice(chunk.first, chunk.first + chunk.count)
            q = torch.cat([q_nope[mine], q_rope[mine]], -1)
            out_TX[mine] = self.mla_prefill(q, cache, chunk.block_table, chunk.start, a.kv_b, a.value, a.scale)
        return self.add_rms_norm(self.linear(out_TX, a.o), x_TD, a.post_norm, a.eps)

    def decoder(
        self, x_TD: Tensor, layers: Sequence[DecoderLayer], rows: AttentionRows, caches: Sequence[Tensor]
    ) -> Tensor:
        """Decoder layers one after the other, each with its cache → the last one's output. x is written over.

        What it is made of is said here; a backend may do it in one piece, to the same bits as its own operations give.
        """
        for layer, cache in zip(layers, caches, strict=False):
            h_TD = self.attention(x_TD, layer.attention, rows, cache)
            if layer.router is not None:
                assert layer.bank is not None and layer.slot_of_E is not None
                x_TD = self.moe(h_TD, layer.router, layer.bank, layer.slot_of_E, layer.gate_up, layer.down, x_TD)
            else:
                assert layer.gate_up is not None and layer.down is not None
                x_TD += self.mlp(h_TD, layer.gate_up, layer.down)
        return x_TD

    def draft(self, layer: DraftLayer, cache: Tensor, streams: Sequence[DraftStream]) -> list[list[int]] | None:
        """Guesses for each stream, and the layer's latents in its cache: what actors/models/mtp.py makes of the
        operations, to the same bits, in one piece. None: this backend has it in no piece."""
        return None

    # --- sampling ---------------------------------------------------------------------------------

    def forbid(self, logits_NV: Tensor, rows: Sequence[int], allowed_RW: Tensor) -> None:
        """In place: the logits of these rows are -inf where `allowed`, with a line for each of them as `token_bits`
        reads it, does not have the token. All others stay as they are, to the bit."""
        allowed_RV = token_bits(allowed_RW.to(logits_NV.device), logits_NV.shape[1])
        for row, allowed_V in zip(rows, allowed_RV, strict=True):
            logits_NV[row].masked_fill_(~allowed_V, -torch.inf)

    @abstractmethod
    def sample(
        self,
        logits_TV: Tensor,
        temperature_T: Tensor,
        top_p_T: Tensor,
        top_k_T: Tensor,
        seed_T: Tensor,
        index_T: Tensor,
    ) -> Tensor:
        """Token ids int64 [T]; -1 for a row that is NaN throughout (on native and plain torch). logits float32;
        temperature, top_p float64; top_k int64 (<1: off); seed, index int64.

        Temperature 0 takes the largest logit (the lowest id of equal ones). Otherwise the largest of logit/temperature
        + Gumbel noise among the tokens that top-k, then top-p (the smallest set of most likely tokens that reaches p)
        leave. The noise is a hash of (seed, index, token id) alone: see `gumbel_noise` in kernels/reference.py.
        """


def token_bits(words_RW: Tensor, width: int) -> Tensor:
    """bool [R, width]: token t is bit t % 32 of word t // 32 of its row, int32."""
    bits = torch.arange(32, dtype=torch.int32, device=words_RW.device)
    return (words_RW.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, :width]
