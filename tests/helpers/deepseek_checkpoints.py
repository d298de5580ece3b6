"""Random `deepseek_v3` checkpoints in the hub's layout: config.json, safetensors, an index where there are several
shards.

Weights are scaled so that activations keep their size and logits are spread (their standard deviation is about 4):
greedy choices then have margins far above float32 rounding. Knows nothing of isotherm's own code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0

# Small on purpose, with as many different sizes as there are names, so that no two dimensions can be mixed up unseen.
BASE_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 56,
    "intermediate_size": 88,
    "moe_intermediate_size": 36,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 26,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 18,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ROPE_THETA = 10000.0


def make_config(
    overrides: Mapping[str, Any] | None = None,
    *,
    dtype: str = "bfloat16",
    fp8: bool = False,
    mtp: bool = False,
    rope: Mapping[str, Any] | None = None,
    rope_style: str = "old",
) -> dict[str, Any]:
    """A config.json. `rope` holds YaRN's parameters without the type and theta (None: plain rope). `rope_style` "old"
    writes `rope_theta` and `rope_scaling` with `type`; "new" writes `rope_parameters` with `rope_type` and
    `rope_theta`."""
    config = dict(BASE_CONFIG)
    if rope_style == "old":
        config |= {
            "torch_dtype": dtype,
            "rope_theta": ROPE_THETA,
            "rope_scaling": None if rope is None else {"type": "yarn", **rope},
        }
    elif rope_style == "new":
        kind = {"rope_type": "default"} if rope is None else {"rope_type": "yarn", **rope}
        config |= {"dtype": dtype, "rope_parameters": {"rope_theta": ROPE_THETA, **kind}}
    else:
        raise ValueError(f'rope_style is "{rope_style}"; it must be "old" or "new"')
    if mtp:
        config["num_nextn_predict_layers"] = 1
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return config | dict(overrides or {})


def is_moe(config: Mapping[str, Any], layer: int) -> bool:
    """As DeepSeek's modeling_deepseek.py decides it, and GLM's by a list."""
    if config.get("mlp_layer_types") is not None and layer < config["num_hidden_layers"]:
        return bool(config["mlp_layer_types"][layer] == "sparse")
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, K] and its float32 scale per 128×128 block; blocks at the edges may be ragged."""
    scale = torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[tile].abs().max() / FP8_MAX
            data[tile] = (weight[tile] / scale[i, j]).to(torch.float8_e4m3fn)
    return data, scale


def dequantise(data: Tensor, scale: Tensor) -> Tensor:
    """float32; the inverse of `quantise`, block by block."""
    out = data.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j].float()
    return out


class _Weights:
    """Draws a model's tensors in order of name, so that one seed gives one model."""

    def __init__(self, config: Mapping[str, Any], seed: int, dtype: torch.dtype, fp8: bool):
        self.config, self.dtype, self.fp8 = config, dtype, fp8
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def norm(self, name: str, width: int) -> None:
        self.tensors[f"{name}.weight"] = (1 + self.normal(width, std=0.2)).to(self.dtype)

    def projection(self, name: str, rows: int, columns: int, gain: float = 1.4) -> None:
        weight = self.normal(rows, columns, std=gain / columns**0.5)
        if not self.fp8:
            self.tensors[f"{name}.weight"] = weight.to(self.dtype)
            return
        # Blocks of different sizes: with one scale for all, a wrong block index would go unseen.
        tiles = 0.5 + torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=self.generator)
        weight *= tiles.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.weight_scale_inv"] = quantise(weight)

    def bias(self, name: str, width: int) -> None:
        if self.config["attention_bias"]:
            self.tensors[f"{name}.bias"] = self.normal(width, std=0.3).to(self.dtype)

    def mlp(self, name: str, inner: int) -> None:
        self.projection(f"{name}.gate_proj", inner, self.config["hidden_size"])
        self.projection(f"{name}.up_proj", inner, self.config["hidden_size"])
        self.projection(f"{name}.down_proj", self.config["hidden_size"], inner)

    def attention(self, p: str) -> None:
        c, d, heads = self.config, self.config["hidden_size"], self.config["num_attention_heads"]
        q_width = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        if c["q_lora_rank"] is None:
            self.projection(f"{p}.q_proj", q_width, d)
        else:
            self.projection(f"{p}.q_a_proj", c["q_lora_rank"], d)
            self.bias(f"{p}.q_a_proj", c["q_lora_rank"])
            self.norm(f"{p}.q_a_layernorm", c["q_lora_rank"])
            self.projection(f"{p}.q_b_proj", q_width, c["q_lora_rank"])
        self.projection(f"{p}.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"], d)
        self.bias(f"{p}.kv_a_proj_with_mqa", c["kv_lora_rank"] + c["qk_rope_head_dim"])
        self.norm(f"{p}.kv_a_layernorm", c["kv_lora_rank"])
        self.projection(f"{p}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        self.projection(f"{p}.o_proj", d, heads * c["v_head_dim"], gain=2.0)
        self.bias(f"{p}.o_proj", d)

    def layer(self, i: int, moe: bool) -> None:
        c, p = self.config, f"model.layers.{i}"
        self.norm(f"{p}.input_layernorm", c["hidden_size"])
        self.norm(f"{p}.post_attention_layernorm", c["hidden_size"])
        self.attention(f"{p}.self_attn")
        if not moe:
            self.mlp(f"{p}.mlp", c["intermediate_size"])
            return
        experts = c["n_routed_experts"]
        self.tensors[f"{p}.mlp.gate.weight"] = self.normal(
            experts, c["hidden_size"], std=1.4 / c["hidden_size"] ** 0.5
        ).to(self.dtype)
        # Spread enough to change the choice of experts, so that a bias left out, or put into the weights, is seen.
        self.tensors[f"{p}.mlp.gate.e_score_correction_bias"] = self.normal(experts, std=0.2)
        if c["n_shared_experts"]:
            self.mlp(f"{p}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
        for e in range(experts):
            self.mlp(f"{p}.mlp.experts.{e}", c["moe_intermediate_size"])

    def mtp(self, i: int) -> None:
        """The next-token-prediction layer, as the hub's DeepSeek-V3 names it; its embedding and head are the model's
        own, stored again. JoyAI's has a dense MLP where all others have experts (arXiv:2604.03044, §2.1)."""
        d, p = self.config["hidden_size"], f"model.layers.{i}"
        self.layer(i, moe=self.config["model_type"] != "joyai_llm_flash")
        self.norm(f"{p}.enorm", d)
        self.norm(f"{p}.hnorm", d)
        self.tensors[f"{p}.eh_proj.weight"] = self.normal(d, 2 * d, std=d**-0.5).to(self.dtype)
        self.norm(f"{p}.shared_head.norm", d)
        self.tensors[f"{p}.embed_tokens.weight"] = self.tensors["model.embed_tokens.weight"].clone()
        if "lm_head.weight" in self.tensors:
            self.tensors[f"{p}.shared_head.head.weight"] = self.tensors["lm_head.weight"].clone()


def make_tensors(
    config: Mapping[str, Any], seed: int = 0, *, dtype: str = "bfloat16", fp8: bool = False
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of this config, by its name on the hub. Deterministic in (config, seed,
    dtype, fp8)."""
    w = _Weights(config, seed, getattr(torch, dtype), fp8)
    d, vocab = config["hidden_size"], config["vocab_size"]
    tied = config["tie_word_embeddings"]
    w.tensors["model.embed_tokens.weight"] = w.normal(vocab, d, std=4 / d**0.5 if tied else 1.0).to(w.dtype)
    for i in range(config["num_hidden_layers"]):
        w.layer(i, is_moe(config, i))
    w.norm("model.norm", d)
    if not tied:
        w.tensors["lm_head.weight"] = w.normal(vocab, d, std=4 / d**0.5).to(w.dtype)
    for i in range(config["num_nextn_predict_layers"]):
        w.mtp(config["num_hidden_layers"] + i)
    return w.tensors


def write_checkpoint(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """Tensors are dealt out to the shards in turn, so that one layer's lie in several files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config), indent=2))
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i % shards][name] = tensor
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_checkpoint(
    path: Path,
    config_overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    *,
    dtype: str = "bfloat16",
    fp8: bool = False,
    shards: int = 1,
    mtp: bool = False,
    rope: Mapping[str, Any] | None = None,
    rope_style: str = "old",
    change: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> Path:
    """Write a random checkpoint to the directory `path` and return it. `change` may edit the tensors before they are
    written."""
    config = make_config(config_overrides, dtype=dtype, fp8=fp8, mtp=mtp, rope=rope, rope_style=rope_style)
    tensors = make_tensors(config, seed, dtype=dtype, fp8=fp8)
    change(tensors)
    return write_checkpoint(path, config, tensors, shards)
