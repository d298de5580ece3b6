"""A checkpoint whose router prefers some experts, all of them in the first half of the ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepseek_checkpoints import make_checkpoint

from isotherm.cluster.model.path import bundled_model

# Large enough that an expert group has something to do, small enough to be made in a second.
SMALL: dict[str, Any] = {
    "vocab_size": 1280, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 32, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip


def skewed_checkpoint(path: Path, skew: float = 1.2, **config: Any) -> Path:
    """Hotness falls with the expert's id by Zipf's law with this exponent, through the router's correction bias. With a
    tokenizer."""

    def make_hot(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("e_score_correction_bias")]:
            tensors[name] = 1.5 * torch.arange(1, len(tensors[name]) + 1, dtype=torch.float32) ** -skew

    make_checkpoint(path, SMALL | config, change=make_hot)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((bundled_model() / file).read_bytes())
    return path
