"""The table of forward passes; a further family is a class for each half and a line in each of two tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from family_checkpoints import make_family
from toy_family import MODEL_TYPE, ToyConfig, ToyModel, make_toy

from isotherm.actors.local import local_engine, run
from isotherm.actors.models import registry
from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.cli.offline import OfflineOptions, generate_offline
from isotherm.cluster.deploy.inspect import inspect_model
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.manifest import Manifest, kv_bytes_per_token
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model import registry as model_registry
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError
from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.kernels.reference import ReferenceKernels

SCHEDULER = SchedulerConfig(16, 32, 64, 4, 128)
OPTIONS = OfflineOptions(
    prompt=None, prompt_ids="3,1,4,1,5,9,2,6", chat=None, max_tokens=24, temperature=1.0, top_p=1.0, top_k=0, seed=5,
    ignore_eos=True, dtype="float32", kernels="reference", logprobs=None,
)  # fmt: skip


def test_every_family_that_can_be_read_can_be_computed():
    assert registry.FAMILIES.keys() == model_registry.FAMILIES.keys()


def test_a_checkpoint_is_loaded_as_its_family_says(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, dtype="float32"))
    kernels, seen = ReferenceKernels(torch.float32), []
    with WeightReader(checkpoint) as reader:
        model = load_model(checkpoint.config, kernels, reader, 64, progress=seen.append)
        assert type(model) is DeepseekV3Model and len(model.cos) == 64 and seen[-1] == 1.0
        other = replace(checkpoint.config, model_type="toy_moe")
        with pytest.raises(ModelConfigError, match='model_type "toy_moe" has no forward pass; known here: deepseek_v3'):
            load_model(other, kernels, reader, 64)


@pytest.mark.parametrize("kept", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
def test_caches_take_the_bytes_that_the_memory_was_divided_by(
    tmp_path: Path, family: str, dtype: str, kept: KvCacheDtype
):
    indexer = {"index_topk": 24, "index_n_heads": 2, "index_head_dim": 12}
    if family == "deepseek_v3":
        checkpoint = Checkpoint.open(make_checkpoint(tmp_path, mtp=True)).with_mtp()
    else:
        checkpoint = Checkpoint.open(make_family(tmp_path, family, indexer))
    kernels = ReferenceKernels(getattr(torch, dtype))
    with WeightReader(checkpoint) as reader:
        model = load_model(checkpoint.config, kernels, reader, 64, kv_cache_dtype=kept)
    caches = model.new_cache(5, 16) + ([] if model.mtp is None else [model.mtp.new_cache(5, 16)])
    assert (model.mtp is not None) == (family == "deepseek_v3")
    assert sum(cache.nbytes for cache in caches) == 5 * 16 * kv_bytes_per_token(checkpoint.config, dtype, kept)


# --- a further family -----------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lines that make the toy a family like any other."""
    monkeypatch.setitem(model_registry.FAMILIES, MODEL_TYPE, ToyConfig)
    monkeypatch.setitem(registry.FAMILIES, MODEL_TYPE, ToyModel)


def generated(path: Path, **options: Any) -> list[int]:
    """By `isotherm generate`."""
    tokens: list[int] = generate_offline(Manifest(), path, replace(OPTIONS, **options))["token_ids"]
    assert len(tokens) == OPTIONS.max_tokens
    return tokens


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_a_further_family_generates(toy: None, tmp_path: Path, fp8: bool):
    """The same numbers give the same tokens; where logits are halved, those of twice the temperature."""
    weights: dict[str, Any] = {"dtype": "float32", "fp8": fp8}
    theirs = make_checkpoint(tmp_path / "deepseek_v3", **weights)
    same, halved = (make_toy(tmp_path / f"{scale}", scale, **weights) for scale in (1.0, 0.5))
    assert generated(same) == generated(theirs)
    assert generated(halved) == generated(theirs, temperature=2.0) != generated(theirs)


def test_its_experts_can_be_in_several_groups(toy: None, tmp_path: Path):
    checkpoint = Checkpoint.open(make_toy(tmp_path, 0.5, dtype="float32"))
    request = GenerationRequest("r", (3, 1, 4, 1, 5, 9, 2, 6), SamplingParams(12, temperature=1.0, seed=5))
    alone, parted = (
        [
            token
            for delta in run(local_engine(checkpoint, ReferenceKernels(torch.float32), SCHEDULER, groups), [request])
            for token in delta.token_ids
        ]
        for groups in (1, 3)
    )
    assert len(alone) == 12 and parted == alone


def test_its_checkpoint_is_checked_by_its_own_names(toy: None, tmp_path: Path):
    path = make_toy(tmp_path, 1.0, dtype="float32")
    report = inspect_model(path, Manifest())
    assert report.parameters == inspect_model(make_checkpoint(tmp_path / "d", dtype="float32"), Manifest()).parameters
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace(MODEL_TYPE, "deepseek_v3"))
    with pytest.raises(CheckpointError, match=re.escape("model.layers.1.mlp.experts.0.gate_proj.weight is missing")):
        Checkpoint.open(path)


def test_a_family_is_part_of_the_fingerprint(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where every other field, name and byte is the same."""

    class Twin(model_registry.FAMILIES["deepseek_v3"]):  # type: ignore[misc]
        pass

    path = make_checkpoint(tmp_path / "one", dtype="float32")
    digest = Checkpoint.open(path).digest()
    monkeypatch.setitem(model_registry.FAMILIES, "twin", Twin)
    (path / "config.json").write_text((path / "config.json").read_text().replace("deepseek_v3", "twin"))
    assert Checkpoint.open(path).config.model_type == "twin" and Checkpoint.open(path).digest() != digest
    scaled = {Checkpoint.open(make_toy(tmp_path / f"{s}", s, dtype="float32")).digest() for s in (1.0, 0.5)}
    assert len(scaled) == 2 and digest not in scaled
