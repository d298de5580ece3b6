"""Random checkpoints of DeepSeek-V3's relatives, and the random configs that they are made of: each as its family's
published checkpoints are, small. Knows nothing of isotherm's own code."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepseek_checkpoints import BLOCK, FP8_MAX, dequantise, make_config, make_tensors, write_checkpoint
from torch import Tensor

TEXT_MODEL = "language_model."
DTYPES = ("bfloat16", "float32", "float16")
YARN = {"factor": 8, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 1.0}


def random_config(family: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of a config, and the options of `make_family`: the family's own traits, the rest drawn by `number`."""
    draw = random.Random(f"{family} {number}")
    heads = draw.randint(1, 6)
    groups = draw.choice([1, 2, 4])
    overrides: dict[str, Any] = {
        "vocab_size": draw.randint(150, 260),
        "hidden_size": draw.randrange(40, 72, 4),
        "intermediate_size": draw.randrange(60, 100, 4),
        "moe_intermediate_size": draw.randrange(20, 48, 4),
        "num_hidden_layers": draw.randint(2, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw.randrange(16, 40, 2),
        "kv_lora_rank": draw.randrange(16, 48, 4),
        "qk_nope_head_dim": draw.randrange(8, 24, 2),
        "qk_rope_head_dim": draw.choice([4, 8, 12]),
        "v_head_dim": draw.randrange(8, 36, 2),
        "n_routed_experts": 4 * draw.randint(2, 4),
        "num_experts_per_tok": draw.randint(1, 4),
        "n_group": groups,
        "topk_group": draw.randint(1, groups) if groups > 1 else 1,
        "n_shared_experts": draw.randint(1, 2),
        "routed_scaling_factor": draw.choice([1.0, 1.8, 2.5, 2.827]),
        "max_position_embeddings": 512,
    }
    overrides["num_experts_per_tok"] = min(
        overrides["num_experts_per_tok"], overrides["n_routed_experts"] // groups * overrides["topk_group"]
    )
    # A third in FP8, of which half have the scales of V3.1.
    fp8 = number % 3 == 2
    options: dict[str, Any] = {"dtype": draw.choice(DTYPES), "fp8": fp8, "mtp": draw.random() < 0.3}
    options["scales"] = draw.choice(["e8m0", "ue8m0"]) if fp8 and number % 2 else "float32"
    yarn = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    if family == "kimi_k2" or family == "kimi_k25":
        overrides |= {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "rope_theta": 5e4, "eos_token_id": 3}
        overrides["num_experts_per_tok"] = draw.randint(1, 6)
        options["rope"] = yarn | {"factor": draw.choice([8, 32, 64])}
    elif family == "moonlight":
        overrides |= {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "rope_theta": 5e4}
    elif family == "glm4_moe_lite":
        layers = overrides["num_hidden_layers"]
        types = ["dense", *(draw.choice(["dense", "sparse", "sparse"]) for _ in range(layers - 2)), "sparse"]
        overrides |= {
            "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "mlp_layer_types": types, "eos_token_id": [2, 3, 5],
            "partial_rotary_factor": 1.0,
        }  # fmt: skip
        options["rope_style"] = "new"
    elif family == "joyai_llm_flash":
        overrides |= {"rope_theta": 3.2e7, "n_group": 1, "topk_group": 1}
    elif family == "deepseek_v32":
        rope = overrides["qk_rope_head_dim"]
        overrides |= {"index_n_heads": draw.randint(8, 14), "index_head_dim": rope + draw.randrange(4, 24, 4)}
        overrides |= {"index_topk": draw.choice([24, 40, 56]), "max_position_embeddings": 512}
        options["rope"] = yarn if draw.random() < 0.6 else None
    return overrides, options


def make_family(
    path: Path,
    family: str,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    *,
    scales: str = "float32",
    dtype: str = "bfloat16",
    fp8: bool = False,
    mtp: bool = False,
    rope: Mapping[str, Any] | None = None,
    rope_style: str = "old",
) -> Path:
    """Write a random checkpoint of a family ("moonlight" for deepseek_v3 as Moonlight has it). `scales` of FP8:
    "float32", or powers of two as "ue8m0" (stored as float32) and "e8m0" (stored as such)."""
    model_type = "deepseek_v3" if family == "moonlight" else family
    config = make_config(overrides, dtype=dtype, fp8=fp8, mtp=mtp, rope=rope, rope_style=rope_style)
    config["model_type"] = model_type
    tensors = make_tensors(config, seed, dtype=dtype, fp8=fp8)
    generator = torch.Generator().manual_seed(7000 + seed)
    tensors["lm_head.weight"] *= 0.6  # logits are less spread, and so hold more digits behind the point
    if rope is not None:
        # YaRN multiplies the scores, to which a trained model is used; random ones would choose single positions.
        for name in [name for name in tensors if name.endswith(("q_a_layernorm.weight", "kv_a_layernorm.weight"))]:
            tensors[name] *= 0.6
    if model_type == "deepseek_v32":
        _add_indexers(tensors, config, generator)
    if scales != "float32":
        config["quantization_config"]["scale_fmt"] = "ue8m0"
        _powers_of_two(tensors, torch.float8_e8m0fnu if scales == "e8m0" else torch.float32)
    if model_type == "kimi_k25":
        tensors = {f"{TEXT_MODEL}{name}": tensor for name, tensor in tensors.items()}
        tensors |= {
            "vision_tower.patch_embed.proj.weight": torch.randn(8, 3, 2, 2, generator=generator),
            "mm_projector.linear_1.weight": torch.randn(8, 8, generator=generator),
        }
        config = {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": model_type,
            "text_config": config | {"model_type": "kimi_k2"},
            "vision_config": {"hidden_size": 8},
        }
    return write_checkpoint(path, config, tensors, 1 + seed % 2)


def _add_indexers(tensors: dict[str, Tensor], c: Mapping[str, Any], generator: torch.Generator) -> None:
    dtype = tensors["model.norm.weight"].dtype

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    width, heads, hidden = c["index_head_dim"], c["index_n_heads"], c["hidden_size"]
    for layer in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        p = f"model.layers.{layer}.self_attn.indexer"
        rank = c["q_lora_rank"]
        tensors[f"{p}.wq_b.weight"] = normal(heads * width, rank, std=2 / rank**0.5).to(dtype)
        tensors[f"{p}.wk.weight"] = normal(width, hidden, std=2 / hidden**0.5).to(dtype)
        tensors[f"{p}.weights_proj.weight"] = normal(heads, hidden, std=2 / hidden**0.5).to(dtype)
        tensors[f"{p}.k_norm.weight"] = 1 + normal(width, std=0.2)
        tensors[f"{p}.k_norm.bias"] = normal(width, std=0.2)


def _powers_of_two(tensors: dict[str, Tensor], stored: torch.dtype) -> None:
    """Every FP8 weight anew, with scales that are powers of two."""
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = dequantise(tensors[name.removesuffix("_scale_inv")], tensors[name])
        scale = torch.empty_like(tensors[name])
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                tile = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                scale[i, j] = 2.0 ** math.ceil(math.log2(float(tile.abs().max()) / FP8_MAX))
                tile /= scale[i, j]
        tensors[name.removesuffix("_scale_inv")] = weight.to(torch.float8_e4m3fn)
        tensors[name] = scale.to(stored)
