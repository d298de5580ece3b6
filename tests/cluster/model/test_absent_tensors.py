"""What a checkpoint may lack, and what is said of what it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantised_checkpoints as published
from deepseek_checkpoints import make_checkpoint

from isotherm.cluster.model.checkpoint import INDEX, Checkpoint, CheckpointError

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
VISION, LEFT_OVER = "vision_tower.proj.weight", f"{GATE}_scale_inv"


def name_in_index(path: Path, more: dict[str, str]) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= more
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "model-00003-of-00002.safetensors"])
@pytest.mark.parametrize("name", [VISION, LEFT_OVER, "model.layers.3.eh_proj.weight"])
def test_what_an_index_names_and_nobody_needs_may_be_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, file: str
):
    """Left over from what was cast, or taken away: of a file that is there, and of one that is not."""
    make_checkpoint(tmp_path, shards=2)
    whole = Checkpoint.open(tmp_path)
    assert not caplog.records
    name_in_index(tmp_path, {name: file, f"{name}_2": file})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors == whole.tensors and not checkpoint.has_mtp and checkpoint.digest() == whole.digest()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / INDEX}: names what is not there, and not needed: {name} and 1 more"
    ]


def test_a_zero_point_that_the_index_alone_names_is_missed(tmp_path: Path):
    """A weight may have none, but one that had some is not read as if it had not."""
    narrow, _ = published.written(tmp_path, "pack-quantized")
    weight_map = json.loads((narrow / INDEX).read_text())["weight_map"]
    name, file = f"{GATE}_zero_point", weight_map[f"{GATE}_packed"]
    name_in_index(narrow, {name: file})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(narrow)
    assert str(caught.value) == f"{narrow / file}: tensor {name} is in {INDEX} but not in the file"


@pytest.mark.parametrize(
    ("kind", "there"),
    [
        ("pack-quantized", "`weight_packed`, `weight_scale`, `weight_shape` are"),
        ("gptq", "`g_idx`, `qweight`, `qzeros`, `scales` are"),
    ],
)
def test_a_quantised_weight_that_config_json_does_not_describe_is_named(tmp_path: Path, kind: str, there: str):
    narrow, _ = published.written(tmp_path, kind)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(narrow)
    message = str(caught.value)
    assert "self_attn.q_a_proj.weight is missing; expected shape [64, 128], but " in message
    assert message.endswith(f", but {there} there, which config.json does not describe")
