"""A `deepseek_v3` checkpoint: what its config.json says, and the tensors that it must hold, by the hub's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import (
    Fields,
    ModelConfig,
    RopeConfig,
    parse_quantisation,
    parse_rope,
    token_ids,
)
from isotherm.cluster.model.kv_cache import KvCacheDtype, latent_row_bytes
from isotherm.cluster.model.tensors import Part, TensorSpec, mlp_projections, mlp_tensors


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(ModelConfig):
    """Multi-head latent attention (arXiv:2405.04434, §2.1), then dense MLPs or routed and shared experts
    (arXiv:2412.19437, §2.1.2). Relatives are subclasses: most differ in names and in values of fields alone."""

    label: ClassVar[str] = "DeepSeek-V3"
    prefix: ClassVar[str] = ""  # before the name of every tensor
    # What a field that is absent means: the values of transformers' class of this family.
    defaults: ClassVar[Mapping[str, Any]] = {
        "q_lora_rank": 1536,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    }

    intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rms_norm_eps: float
    rope: RopeConfig
    first_k_dense_replace: int
    moe_layer_freq: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_nextn_predict_layers: int  # what config.json says; the files may lack them

    @classmethod
    def read(cls, f: Fields) -> JSON:
        """Sizes must be there; every other field that is absent has the value that transformers' class and the
        publisher's own configuration class give it."""
        f.exactly("hidden_act", ("silu",), "silu")
        f.exactly("scoring_func", ("sigmoid",), "sigmoid")
        f.exactly("topk_method", ("noaux_tc",), "noaux_tc")
        f.exactly("rope_interleave", (True,), True)
        rope_dim = f.integer("qk_rope_head_dim")
        if rope_dim % 2:
            raise f.fail("qk_rope_head_dim", rope_dim, "even")
        lenient, d = Fields(f.raw, f.where, null_is_absent=True), cls.defaults
        max_position = f.integer("max_position_embeddings", d["max_position_embeddings"])
        return dict(
            model_type=f.raw["model_type"],
            vocab_size=f.integer("vocab_size"),
            hidden_size=f.integer("hidden_size"),
            intermediate_size=f.integer("intermediate_size"),
            num_hidden_layers=f.integer("num_hidden_layers"),
            num_attention_heads=f.integer("num_attention_heads"),
            q_lora_rank=None
            if f.value("q_lora_rank", d["q_lora_rank"]) is None
            else f.integer("q_lora_rank", d["q_lora_rank"]),
            kv_lora_rank=f.integer("kv_lora_rank"),
            qk_nope_head_dim=f.integer("qk_nope_head_dim"),
            qk_rope_head_dim=rope_dim,
            v_head_dim=f.integer("v_head_dim"),
            attention_bias=f.boolean("attention_bias", False),
            rms_norm_eps=f.number("rms_norm_eps", d["rms_norm_eps"]),
            max_position_embeddings=max_position,
            tie_word_embeddings=f.boolean("tie_word_embeddings", False),
            rope=parse_rope(lenient, max_position),
            first_k_dense_replace=f.integer("first_k_dense_replace", d["first_k_dense_replace"], minimum=0),
            moe_layer_freq=f.integer("moe_layer_freq", 1),
            moe_intermediate_size=f.integer("moe_intermediate_size"),
            n_shared_experts=0
            if f.value("n_shared_experts", d["n_shared_experts"]) is None  # as DeepSeek's own modeling file reads it
            else f.integer("n_shared_experts", d["n_shared_experts"], minimum=0),
            norm_topk_prob=f.boolean("norm_topk_prob", True),
            routed_scaling_factor=f.number("routed_scaling_factor", d["routed_scaling_factor"]),
            num_nextn_predict_layers=lenient.integer(
                "num_nextn_predict_layers", d["num_nextn_predict_layers"], minimum=0
            ),
            quantisation=parse_quantisation(f),
            stored_dtype=str(f.raw.get("torch_dtype") or f.raw.get("dtype") or "bfloat16").removeprefix("torch."),
            eos_token_ids=token_ids({"eos_token_id": 1} | f.raw, "eos_token_id", f.where),
            **_parse_routing(f, d),
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """The latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def cache_bytes(self, element: int, kept: KvCacheDtype) -> int:
        return latent_row_bytes(self.kv_lora_rank, self.qk_rope_head_dim, element, kept)

    @property
    def softmax_scale(self) -> float:
        scale: float = self.qk_head_dim**-0.5
        return scale * self.rope.softmax_factor

    def is_moe(self, layer: int) -> bool:
        """The MTP layers, from num_hidden_layers on, all are."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    # --- tensors ----------------------------------------------------------------------------------

    @property
    def embedding(self) -> str:
        """Name of a weight; so are the next two."""
        return f"{self.prefix}model.embed_tokens.weight"

    @property
    def last_norm(self) -> str:
        return f"{self.prefix}model.norm.weight"

    @property
    def head(self) -> str:
        return self.embedding if self.tie_word_embeddings else f"{self.prefix}lm_head.weight"

    def layer(self, i: int) -> str:
        """What the names of the tensors of layer `i` begin with."""
        return f"{self.prefix}model.layers.{i}"

    def tensors(self) -> Iterator[TensorSpec]:
        yield TensorSpec(self.embedding, (self.vocab_size, self.hidden_size), Part.EMBEDDING)
        for layer in range(self.num_hidden_layers):
            yield from self.layer_tensors(layer)
        yield TensorSpec(self.last_norm, (self.hidden_size,), Part.HEAD)
        if not self.tie_word_embeddings:
            yield TensorSpec(self.head, (self.vocab_size, self.hidden_size), Part.HEAD, quantisable=True)

    def layer_tensors(self, layer: int) -> Iterator[TensorSpec]:
        p, d = self.layer(layer), self.hidden_size
        yield TensorSpec(f"{p}.input_layernorm.weight", (d,), Part.ATTENTION)
        yield TensorSpec(f"{p}.post_attention_layernorm.weight", (d,), Part.ATTENTION)
        yield from self._attention_tensors(f"{p}.self_attn")
        if not self.is_moe(layer):
            yield from mlp_tensors(mlp_projections(f"{p}.mlp"), d, self.intermediate_size, Part.DENSE_MLP)
            return
        yield TensorSpec(f"{p}.mlp.gate.weight", (self.n_routed_experts, d), Part.ROUTER)
        yield TensorSpec(f"{p}.mlp.gate.e_score_correction_bias", (self.n_routed_experts,), Part.ROUTER)
        if self.n_shared_experts:
            inner = self.moe_intermediate_size * self.n_shared_experts
            yield from mlp_tensors(mlp_projections(f"{p}.mlp.shared_experts"), d, inner, Part.SHARED_EXPERTS)
        for expert in range(self.n_routed_experts):
            yield from self.expert_tensors(layer, expert)

    def expert_projections(self, layer: int, expert: int) -> tuple[str, str, str]:
        return mlp_projections(f"{self.layer(layer)}.mlp.experts.{expert}")

    def expert_tensors(self, layer: int, expert: int) -> Iterator[TensorSpec]:
        names = self.expert_projections(layer, expert)
        yield from mlp_tensors(names, self.hidden_size, self.moe_intermediate_size, Part.ROUTED_EXPERTS)

    def _attention_tensors(self, p: str) -> Iterator[TensorSpec]:
        def projection(
            name: str, rows: int, columns: int, biased: bool = False, both_ways: tuple[int, int] | None = None
        ) -> Iterator[TensorSpec]:
            yield TensorSpec(f"{p}.{name}.weight", (rows, columns), Part.ATTENTION, True, both_ways)
            if biased and self.attention_bias:
                yield TensorSpec(f"{p}.{name}.bias", (rows,), Part.ATTENTION)

        q_width = self.num_attention_heads * self.qk_head_dim
        if self.q_lora_rank is None:
            yield from projection("q_proj", q_width, self.hidden_size)
        else:
            yield from projection("q_a_proj", self.q_lora_rank, self.hidden_size, biased=True)
            yield TensorSpec(f"{p}.q_a_layernorm.weight", (self.q_lora_rank,), Part.ATTENTION)
            yield from projection("q_b_proj", q_width, self.q_lora_rank)
        yield from projection("kv_a_proj_with_mqa", self.latent_width, self.hidden_size, biased=True)
        yield TensorSpec(f"{p}.kv_a_layernorm.weight", (self.kv_lora_rank,), Part.ATTENTION)
        head = self.qk_nope_head_dim + self.v_head_dim
        both_ways = (self.qk_nope_head_dim, head)
        yield from projection("kv_b_proj", self.num_attention_heads * head, self.kv_lora_rank, both_ways=both_ways)
        yield from projection("o_proj", self.hidden_size, self.num_attention_heads * self.v_head_dim, biased=True)

    def mtp_layer(self, tensor: str) -> int | None:
        parts = tensor.removeprefix(self.prefix).split(".")
        if len(parts) <= 3 or parts[:2] != ["model", "layers"] or not parts[2].isdecimal():
            return None
        return layer if (layer := int(parts[2])) >= self.num_hidden_layers else None

    def mtp_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """A layer, norms of its two inputs and one before the head, and a projection from twice the hidden size. The
        embedding and the head, which the files may have again, are the model's own as a rule."""
        p, d = self.layer(layer), self.hidden_size
        yield from self.layer_tensors(layer)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield TensorSpec(f"{p}.{norm}.weight", (d,), Part.MTP)
        yield TensorSpec(f"{p}.eh_proj.weight", (d, 2 * d), Part.MTP, quantisable=True)

    def describe(self) -> JSON:
        return {
            "family": f"{self.label} ({self.model_type})",
            "layers": self.num_hidden_layers,
            "dense_layers": self.num_hidden_layers - len(self.moe_layers),
            "moe_layers": len(self.moe_layers),
            "hidden_size": self.hidden_size,
            "attention_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "head_dims": f"{self.qk_nope_head_dim} nope + {self.qk_rope_head_dim} rope, value {self.v_head_dim}",
            "routed_experts": f"{self.num_experts_per_tok} of {self.n_routed_experts}, "
            f"{self.topk_group} of {self.n_group} router groups",
            "shared_experts": self.n_shared_experts,
            "vocabulary": self.vocab_size,
            "context": self.max_position_embeddings,
            "rope": "plain"
            if self.rope.yarn_factor is None
            else f"YaRN ×{self.rope.yarn_factor:g} from {self.rope.original_max_position}",
        }


def _parse_routing(f: Fields, defaults: Mapping[str, Any]) -> dict[str, int]:
    """How many experts there are, in how many groups, and how many of each a token goes to."""
    experts, groups = f.integer("n_routed_experts"), f.integer("n_group", defaults["n_group"])
    if experts % groups:
        raise f.fail("n_group", groups, f"a divisor of n_routed_experts ({experts})")
    topk_group = f.integer("topk_group", defaults["topk_group"])
    if topk_group > groups:
        raise f.fail("topk_group", topk_group, f"at most n_group ({groups})")
    top_k = f.integer("num_experts_per_tok")
    if top_k > experts // groups * topk_group:
        raise f.fail(
            "num_experts_per_tok", top_k, f"at most the experts in topk_group groups ({experts // groups * topk_group})"
        )
    return {"n_routed_experts": experts, "n_group": groups, "topk_group": topk_group, "num_experts_per_tok": top_k}
