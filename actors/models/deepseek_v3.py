"""The attention shard's part of a DeepSeek-V3 forward pass: embedding, MLA, dense layers, shared experts, router and
head.

Routed experts are somewhere else (protocol.py). Shape suffixes as in kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isotherm.actors.models.decoder import Decoder, Layer, Mlp
from isotherm.actors.models.mtp import MtpLayer
from isotherm.actors.models.protocol import RoutedExperts
from isotherm.actors.models.rope import rope_tables
from isotherm.actors.models.step_batch import StepBatch
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.kernels.cache_rows import new_layer_cache
from isotherm.kernels.ops import AttentionWeights, Kernels, Router

LATENT_NORM_EPS = 1e-6  # DeepSeek's q_a and kv_a norms ignore config.rms_norm_eps


class DeepseekV3Model:
    """Weights of everything but the routed experts, and the forward pass over a paged latent cache."""

    def __init__(
        self,
        config: DeepseekV3Config,
        kernels: Kernels,
        reader: WeightReader,
        max_positions: int,
        *,
        kv_cache_dtype: KvCacheDtype = "auto",
        progress: Callable[[float], None] = lambda _: None,
    ):
        self.config, self.kernels, self.fp8_cache = config, kernels, kv_cache_dtype == "fp8"
        self.embedding = self._own(reader.tensor(config.embedding))
        self.layers = []
        for i in range(config.num_hidden_layers):
            self.layers.append(self._load_layer(reader, i))
            progress((i + 1) / (config.num_hidden_layers + 1))
        self._all = self._decoder(self.layers)
        self.norm = self._own(reader.tensor(config.last_norm))
        self.head = kernels.pack_linear([reader.head(config.head)])
        self.cos, self.sin = (
            table.to(kernels.device) for table in rope_tables(config.rope, config.qk_rope_head_dim, max_positions)
        )
        self.mtp = self._load_mtp(reader, config.num_hidden_layers) if config.drafting_layers else None
        progress(1.0)

    def _decoder(self, layers: Sequence[Layer]) -> Decoder:
        return Decoder(layers)

    def _load_mtp(self, reader: WeightReader, i: int) -> MtpLayer:
        """Embedding and head are the model's own where the files have the same again, or nothing."""
        c, layer = self.config, self._load_layer(reader, i)
        p, embedding, head = c.layer(i), self.embedding, self.head
        own = f"{p}.embed_tokens.weight"
        if reader.has(own) and not reader.are_equal(own, c.embedding):
            embedding = self._own(reader.tensor(own))
        own = f"{p}.shared_head.head.weight"
        if reader.has(own) and not reader.are_equal(own, c.head):
            head = self.kernels.pack_linear([reader.stored(own)])
        return MtpLayer(
            kernels=self.kernels,
            number=i,
            eps=c.rms_norm_eps,
            main_norm=self.norm,
            embedding=embedding,
            enorm=self._norm(reader, f"{p}.enorm"),
            hnorm=self._norm(reader, f"{p}.hnorm"),
            eh_proj=self.kernels.pack_linear([reader.stored(f"{p}.eh_proj.weight")]),
            layer=layer,
            norm=self._norm(reader, f"{p}.shared_head.norm"),
            head=head,
            fp8_cache=self.fp8_cache,
            cos=self.cos,
            sin=self.sin,
        )

    def _load_layer(self, reader: WeightReader, i: int) -> Layer:
        c, p = self.config, self.config.layer(i)
        router = self._load_router(reader, f"{p}.mlp.gate") if c.is_moe(i) else None
        own = f"{p}.mlp" if router is None else f"{p}.mlp.shared_experts" if c.n_shared_experts else None
        return Layer(
            attention=self._load_attention(reader, p),
            mlp=None if own is None else self._load_mlp(reader, own),
            router=router,
        )

    def _load_router(self, reader: WeightReader, p: str) -> Router:
        c = self.config
        stored = reader.tensor(f"{p}.weight")
        # A CPU widens it while it reads it; a GPU would have to do so in a kernel of its own.
        narrow = stored.dtype == torch.bfloat16 and self.kernels.device.type == "cpu"
        weight = self._own(stored, torch.bfloat16 if narrow else torch.float32)
        bias = self._own(reader.tensor(f"{p}.e_score_correction_bias"), torch.float32)
        return Router(
            weight=weight,
            bias=bias,
            n_group=c.n_group,
            topk_group=c.topk_group,
            top_k=c.num_experts_per_tok,
            normalise=c.norm_topk_prob,
            scaling=c.routed_scaling_factor,
        )

    def _norm(self, reader: WeightReader, name: str) -> Tensor:
        return self._own(reader.tensor(f"{name}.weight"))

    def _own(self, stored: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Where the kernels compute, and in their dtype."""
        return stored.to(self.kernels.device, dtype or self.kernels.dtype)

    def _load_attention(self, reader: WeightReader, layer: str) -> AttentionWeights:
        c, k, p = self.config, self.kernels, f"{layer}.self_attn"
        heads, nope, value = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        low_rank = c.q_lora_rank is not None

        def bias(name: str) -> Tensor | None:
            return reader.tensor(f"{p}.{name}.bias") if c.attention_bias else None

        queries, latents = (
            reader.stored(f"{p}.{'q_a_proj' if low_rank else 'q_proj'}.weight"),
            reader.stored(f"{p}.kv_a_proj_with_mqa.weight"),
        )
        biases = [bias("q_a_proj") if low_rank else None, bias("kv_a_proj_with_mqa")]
        parts = [
            torch.zeros(w.shape[0]) if b is None else b.float() for b, w in zip(biases, (queries, latents), strict=True)
        ]
        kv_b = reader.stored(f"{p}.kv_b_proj.weight")
        per_head = kv_b.cut(nope + value, k.dtype)
        return AttentionWeights(
            norm=self._norm(reader, f"{layer}.input_layernorm"),
            post_norm=self._norm(reader, f"{layer}.post_attention_layernorm"),
            eps=c.rms_norm_eps,
            latent_eps=LATENT_NORM_EPS,
            input=k.pack_linear([queries, latents], torch.cat(parts) if c.attention_bias else None),
            q_norm=self._norm(reader, f"{p}.q_a_layernorm") if low_rank else None,
            q_b=k.pack_linear([reader.stored(f"{p}.q_b_proj.weight")]) if low_rank else None,
            kv_norm=self._norm(reader, f"{p}.kv_a_layernorm"),
            kv_b=k.pack_linear([kv_b]),
            k_absorb=k.pack_heads([w.rows(0, nope, k.dtype).transpose(k.dtype) for w in per_head]),
            v_absorb=k.pack_heads([w.rows(nope, nope + value, k.dtype) for w in per_head]),
            o=k.pack_linear([reader.stored(f"{p}.o_proj.weight")], bias("o_proj")),
            heads=heads,
            nope=nope,
            rotary=c.qk_rope_head_dim,
            latent=c.kv_lora_rank,
            value=value,
            scale=c.softmax_scale,
        )

    def _load_mlp(self, reader: WeightReader, p: str) -> Mlp:
        gate, up, down = reader.mlp(p)
        return Mlp(self.kernels.pack_linear([gate, up]), self.kernels.pack_linear([down]))

    def new_cache(self, blocks: int, block_size: int) -> list[Tensor]:
        """A zeroed one for each layer, as kernels/ops.py says it."""
        c, k = self.config, self.kernels
        shape = blocks, block_size, c.kv_lora_rank, c.qk_rope_head_dim
        return [new_layer_cache(*shape, k.dtype, k.device, self.fp8_cache) for _ in range(c.num_hidden_layers)]

    def forward(self, batch: StepBatch, cache: list[Tensor], experts: RoutedExperts) -> Tensor:
        """The last layer's output [T, D]; writes the rows' latents into the cache."""
        x_TD = self.embedding.index_select(0, batch.token_ids)
        return self._all.forward(self.kernels, x_TD, batch.attention, cache, experts)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Float32 [N, V]."""
        k = self.kernels
        return k.linear(k.rms_norm(x_ND, self.norm, self.config.rms_norm_eps), self.head, torch.float32)
