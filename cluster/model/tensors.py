"""Which tensors a checkpoint of one architecture must hold, with their shapes, and which part of a cluster each belongs
to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from isotherm.cluster.model.config import ModelConfig


class Part(str, Enum):
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE_MLP = "dense MLP"
    ROUTER = "router"
    SHARED_EXPERTS = "shared experts"
    ROUTED_EXPERTS = "routed experts"
    HEAD = "output head"
    MTP = "multi-token prediction"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that must be there. `quantisable`: a projection, which may be stored in any weight format; then
    the name is that of the weight, of which the format makes its tensors' names."""

    name: str
    shape: tuple[int, ...]
    part: Part
    quantisable: bool = False


def expert_prefix(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}"


def expected_tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    """Everything the model without its MTP layers needs, in layer order."""
    yield TensorSpec("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), Part.EMBEDDING)
    for layer in range(c.num_hidden_layers):
        yield from layer_tensors(c, layer)
    yield TensorSpec("model.norm.weight", (c.hidden_size,), Part.HEAD)
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), Part.HEAD, quantisable=True)


def layer_tensors(c: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    p, d = f"model.layers.{layer}", c.hidden_size
    yield TensorSpec(f"{p}.input_layernorm.weight", (d,), Part.ATTENTION)
    yield TensorSpec(f"{p}.post_attention_layernorm.weight", (d,), Part.ATTENTION)
    yield from _attention_tensors(c, f"{p}.self_attn")
    if not c.is_moe(layer):
        yield from _mlp_tensors(f"{p}.mlp", d, c.intermediate_size, Part.DENSE_MLP)
        return
    yield TensorSpec(f"{p}.mlp.gate.weight", (c.n_routed_experts, d), Part.ROUTER)
    yield TensorSpec(f"{p}.mlp.gate.e_score_correction_bias", (c.n_routed_experts,), Part.ROUTER)
    if c.n_shared_experts:
        yield from _mlp_tensors(
            f"{p}.mlp.shared_experts", d, c.moe_intermediate_size * c.n_shared_experts, Part.SHARED_EXPERTS
        )
    for expert in range(c.n_routed_experts):
        yield from expert_tensors(c, layer, expert)


def expert_tensors(c: ModelConfig, layer: int, expert: int) -> Iterator[TensorSpec]:
    yield from _mlp_tensors(expert_prefix(layer, expert), c.hidden_size, c.moe_intermediate_size, Part.ROUTED_EXPERTS)


def _attention_tensors(c: ModelConfig, p: str) -> Iterator[TensorSpec]:
    def projection(name: str, rows: int, columns: int, biased: bool = False) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{p}.{name}.weight", (rows, columns), Part.ATTENTION, quantisable=True)
        if biased and c.attention_bias:
            yield TensorSpec(f"{p}.{name}.bias", (rows,), Part.ATTENTION)

    q_width = c.num_attention_heads * c.qk_head_dim
    if c.q_lora_rank is None:
        yield from projection("q_proj", q_width, c.hidden_size)
    else:
        yield from projection("q_a_proj", c.q_lora_rank, c.hidden_size, biased=True)
        yield TensorSpec(f"{p}.q_a_layernorm.weight", (c.q_lora_rank,), Part.ATTENTION)
        yield from projection("q_b_proj", q_width, c.q_lora_rank)
    yield from projection("kv_a_proj_with_mqa", c.cache_width, c.hidden_size, biased=True)
    yield TensorSpec(f"{p}.kv_a_layernorm.weight", (c.kv_lora_rank,), Part.ATTENTION)
    yield from projection("kv_b_proj", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield from projection("o_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim, biased=True)


def _mlp_tensors(p: str, hidden: int, inner: int, part: Part) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{p}.gate_proj.weight", (inner, hidden), part, quantisable=True)
    yield TensorSpec(f"{p}.up_proj.weight", (inner, hidden), part, quantisable=True)
    yield TensorSpec(f"{p}.down_proj.weight", (hidden, inner), part, quantisable=True)
