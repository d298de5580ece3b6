"""Checkpoints of the bundled model's architecture with other weights, or with something else that is other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from isotherm.cluster.model.path import bundled_model

HEAD = "lm_head.weight"


def other_weights(folder: Path, seed: int = 0, **config: Any) -> Path:
    """The bundled model with a head that is a little other, so that its texts are; `config`: fields of config.json that
    are other."""
    folder.mkdir(parents=True)
    for path in bundled_model().iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    tensors = load_file(bundled_model() / "model.safetensors")
    head = tensors[HEAD]
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
    tensors[HEAD] = (head.float() + 0.2 * head.float().std() * noise).to(head.dtype)
    save_file(tensors, folder / "model.safetensors")
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder
