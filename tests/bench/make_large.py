"""Writes a checkpoint of a published model's full widths with random weights, layer by layer, in little memory:

    python tests/bench/make_large.py SHAPE OUT [--layers N] [--int4]

SHAPE: glm-4.7-flash (30 B parameters, 18 GB with --int4), joyai-llm-flash, moonlight. --int4: every projection but the
head and kv_b_proj as compressed-tensors `pack-quantized` integers of four bits. The tokenizer is that of the bundled
model, whose ids are the first of the vocabulary. The numbers repeat, from layer to layer at other places: they are
there to be read, not to mean something.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from make_checkpoint import TEXT_FILES
from published_families import GLM_4_7_FLASH, JOYAI_LLM_FLASH, MOONLIGHT
from quantised_checkpoints import compressed_config

from isotherm.cluster.model.checkpoint import INDEX
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.registry import parse
from isotherm.cluster.model.tensors import TensorSpec

SHAPES = {"glm-4.7-flash": GLM_4_7_FLASH, "joyai-llm-flash": JOYAI_LLM_FLASH, "moonlight": MOONLIGHT}
FILE_BYTES = 1 << 30
GROUP = 32  # inputs under one scale of --int4


class Numbers:
    """Random tensors, cut from pools that were drawn once."""

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(1 << 25, generator=self._generator).to(torch.bfloat16)
        self._words = torch.randint(-(1 << 31), 1 << 31, (1 << 24,), generator=self._generator).int()

    def _cut(self, pool: Tensor, count: int) -> Tensor:
        start = int(torch.randint(0, len(pool), (1,), generator=self._generator))
        copies = -(-(start + count) // len(pool))
        return pool.repeat(copies)[start : start + count].clone()

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return self._cut(self._normal, torch.Size(shape).numel()).view(shape) * std

    def codes(self, shape: tuple[int, int]) -> Tensor:
        """int32 [N, K / 8]: eight codes of four bits each."""
        return self._cut(self._words, shape[0] * shape[1] // 8).view(shape[0], shape[1] // 8)


def tensors_of(spec: TensorSpec, numbers: Numbers, int4: bool) -> dict[str, Tensor]:
    if len(spec.shape) == 1:  # a norm, or the router's correction of scores
        is_bias = spec.name.endswith("bias")
        values = numbers.normal(spec.shape, 0.1) + (0 if is_bias else 1)
        return {spec.name: values.float() if is_bias else values}
    rows, inputs = spec.shape
    if not int4 or not spec.quantisable or spec.both_ways or spec.name == "lm_head.weight":
        return {spec.name: numbers.normal(spec.shape, 1.4 / inputs**0.5)}
    stem = spec.name.removesuffix("weight")
    scale = numbers.normal((rows, inputs // GROUP), 0.1).clamp(-0.5, 0.5) + 1
    return {
        f"{stem}weight_packed": numbers.codes((rows, inputs)),
        f"{stem}weight_scale": scale * (1.4 / 4.6 / inputs**0.5),  # codes from -8 to 7 deviate by 4.6
        f"{stem}weight_shape": torch.tensor(spec.shape),
    }


def files_of(config: dict[str, Any], int4: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after the other."""
    numbers, part, size = Numbers(), {}, 0
    layers = groupby(parse(config).tensors(), lambda spec: spec.name.split(".layers.")[-1].split(".")[0])
    for _, specs in layers:
        for spec in specs:
            part |= tensors_of(spec, numbers, int4)
        size = sum(tensor.nbytes for tensor in part.values())
        if size >= FILE_BYTES:
            yield part
            part = {}
    if part:
        yield part


def write(out: Path, shape: dict[str, Any], int4: bool) -> Path:
    config = shape | {"num_nextn_predict_layers": 0, "max_position_embeddings": 4096}
    if int4:
        ignored = ["lm_head", "re:.*kv_b_proj"]
        config |= {"quantization_config": compressed_config(GROUP) | {"ignore": ignored}}
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(files_of(config, int4)):
        name = f"model-{i:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in TEXT_FILES:
        shutil.copy(bundled_model() / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="of the model's")
    parser.add_argument("--int4", action="store_true", help="projections in four bits")
    a = parser.parse_args()
    shape = SHAPES[a.shape] | ({} if a.layers is None else {"num_hidden_layers": a.layers})
    write(a.out, shape, a.int4)


if __name__ == "__main__":
    main()
