"""Checkpoints as quantisers publish them give what the numbers that they stand for give, with every kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints as published
import torch
from safetensors.torch import load_file, save_file

from isotherm.cluster.cli.offline import OfflineOptions, generate_offline
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError

pytestmark = pytest.mark.slow

OPTIONS = OfflineOptions(
    prompt=None, prompt_ids="5,250,17,99,4,123", chat=None, max_tokens=12, temperature=0.0, top_p=1.0, top_k=0, seed=0,
    ignore_eos=True, dtype="float32", kernels="reference", logprobs=3,
)  # fmt: skip


def generate(path: Path, **changes: Any) -> dict[str, Any]:
    return generate_offline(Manifest(), path, OfflineOptions(**(vars(OPTIONS) | changes)))


@pytest.mark.parametrize("kind", published.PUBLISHED)
def test_it_generates_what_its_numbers_do(tmp_path: Path, kind: str):
    narrow, numbers = map(generate, published.written(tmp_path, kind))
    assert (narrow["token_ids"], narrow["logprobs"]) == (numbers["token_ids"], numbers["logprobs"])
    assert len(set(narrow["token_ids"])) > 2


def test_experts_alone_may_be_quantised(tmp_path: Path):
    """As Kimi K2 Thinking is: what the ignore list names is stored plain."""
    narrow, numbers = published.written(tmp_path, "pack-quantized", all_of=False)
    assert generate(narrow)["logprobs"] == generate(numbers)["logprobs"]
    checkpoint = Checkpoint.open(narrow)
    assert checkpoint.weight_format() == "4-bit integers, groups of 32"


@pytest.mark.parametrize("kind", ["gptq", "pack-quantized"])
def test_act_order_is_refused_when_the_checkpoint_is_opened(tmp_path: Path, kind: str):
    narrow, _ = published.written(tmp_path, kind, shards=1)
    file = narrow / "model.safetensors"
    tensors, leaf = load_file(file), "g_idx" if kind == "gptq" else "weight_g_idx"
    for name in [n for n in tensors if n.endswith(("qweight", "weight_packed"))]:
        inputs = tensors[name].shape[0 if kind == "gptq" else 1] * 8
        tensors[f"{name.rpartition('.')[0]}.{leaf}"] = torch.arange(inputs, dtype=torch.int32).flip(0) // 32
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"weight model\.layers\.0\.\S+ is quantised in act-order: its g_idx"):
        Checkpoint.open(narrow)


@pytest.mark.parametrize(
    ("leaf", "value", "words"),
    [
        ("weight_zero_point", torch.zeros(8, 2, dtype=torch.int8), "expected shape [64, 2], found [8, 2]"),
        ("weight_zero_point", torch.zeros(64, 2, dtype=torch.int32), "expected shape [8, 2], found [64, 2]"),
        ("weight_zero_point", torch.zeros(64, 2, dtype=torch.uint8), "expected shape [8, 2], found [64, 2]"),
        ("weight_zero_point", torch.zeros(8, 2, dtype=torch.int64), "expected dtype I32, I8, found I64"),
        ("weight_g_idx", torch.zeros(128, dtype=torch.int64), "expected dtype I32, found I64"),
        ("weight_g_idx", torch.zeros(64, dtype=torch.int32), "expected shape [128], found [64]"),
    ],
)
def test_what_a_weight_may_have_is_checked_where_it_is(tmp_path: Path, leaf: str, value: torch.Tensor, words: str):
    narrow, _ = published.written(tmp_path, "pack-quantized-asymmetric", shards=1)
    file, name = narrow / "model.safetensors", f"model.layers.1.mlp.experts.3.up_proj.{leaf}"
    save_file(load_file(file) | {name: value}, file)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(narrow)
    assert str(caught.value) == f"{file}: tensor {name}: {words}"


def test_a_zero_point_beyond_four_bits_is_named(tmp_path: Path):
    narrow, _ = published.written(tmp_path, "pack-quantized-loose-zeros", shards=1)
    file, name = narrow / "model.safetensors", "model.layers.1.mlp.experts.3.up_proj.weight_zero_point"
    save_file(load_file(file) | {name: torch.full((64, 2), 8, dtype=torch.int8)}, file)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight: weight_zero_point has 8; it must be -8"):
        generate(narrow)


def test_a_weight_of_another_size_is_named(tmp_path: Path):
    narrow, _ = published.written(tmp_path, "gptq", shards=1)
    config = json.loads((narrow / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qzeros: expected shape \[2, 8\], found \[4, 8\]"):
        Checkpoint.open(narrow)
