"""A toy family of models, made as a further one would be: `deepseek_v3` but that routed experts have other names, and
logits are scaled. It is a class for each half, and a line in each of two tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.cluster.model.config import Fields
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config

MODEL_TYPE = "toy_moe"


@dataclass(frozen=True, kw_only=True)
class ToyConfig(DeepseekV3Config):
    logit_scale: float

    @classmethod
    def read(cls, f: Fields) -> dict[str, Any]:
        return super().read(f) | {"logit_scale": f.number("logit_scale")}

    def expert_projections(self, layer: int, expert: int) -> tuple[str, str, str]:
        p = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        return f"{p}.w1.weight", f"{p}.w3.weight", f"{p}.w2.weight"


class ToyModel(DeepseekV3Model):
    config: ToyConfig

    def logits(self, x_ND: Tensor) -> Tensor:
        return super().logits(x_ND) * self.config.logit_scale


NAMES = {".mlp.experts.": ".block_sparse_moe.experts.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def make_toy(path: Path, logit_scale: float, **options: Any) -> Path:
    """The checkpoint that `make_checkpoint` makes of these options, with the same numbers, as the toy family's."""
    make_checkpoint(path, **options)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": MODEL_TYPE, "logit_scale": logit_scale}))
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".mlp.experts." in name:
            for hub, toy in NAMES.items():
                name = name.replace(hub, toy)
        tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
