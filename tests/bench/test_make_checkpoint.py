"""The checkpoint that the speed figures of docs/performance.md are of has the size that the page says, and can be
served."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from deepseek_checkpoints import make_config

from isotherm.cluster.deploy.inspect import inspect_model
from isotherm.cluster.deploy.preflight import check_servable
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model.checkpoint import INDEX

sys.path.insert(0, str(Path(__file__).parent))

from make_checkpoint import M, write


def test_its_size_is_the_one_of_readme(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(make_config(M)))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    report = inspect_model(tmp_path, Manifest())
    computed = report.parameters["active"] - report.parameters_by_part["embedding"]  # of that a token reads one row
    assert round(report.parameters["total"] / 1e9, 1) == 1.9 and round(computed / 1e9, 2) == 0.42


@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_written_can_be_served(tmp_path: Path, fp8: bool):
    small = M | {"vocab_size": 1280, "hidden_size": 256, "num_hidden_layers": 2, "moe_intermediate_size": 128}
    check_servable(Manifest(), write(tmp_path, fp8, small | {"intermediate_size": 256, "n_routed_experts": 16}))
