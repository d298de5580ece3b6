"""Who may join a cluster, and what its replies are called. Workers are only their fingerprints here."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint, make_config, make_tensors, write_checkpoint

from isotherm.cluster.model import checkpoint as checkpoint_module
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError
from isotherm.cluster.model.fingerprint import ClusterNumerics, Fingerprint, NumericsError

CPU = Fingerprint("0123456789abcdef", "bfloat16", "stored", "cpu", "native", 1, "avx512_bf16")
GPU = replace(CPU, device="cuda", kernels="triton", instructions="sm_90, Triton 3.7.1")
OTHER: dict[str, Any] = {
    "weights": "fedcba9876543210",
    "dtype": "float32",
    "kept": "head fp8",
    "kernels": "reference",
    "summation": 2,
    "instructions": "avx2",
}


def test_every_field_changes_the_digest():
    assert re.fullmatch(r"isotherm-[0-9a-f]{12}", CPU.digest)
    others = [replace(CPU, **{name: value}) for name, value in (OTHER | {"device": "cuda"}).items()]
    assert len({f.digest for f in [CPU, *others]}) == len(fields(Fingerprint)) + 1


def test_the_digest_is_of_the_values_and_the_same_everywhere():
    text = b'[["0123456789abcdef", "bfloat16", "stored", "cpu", "native", 1, "avx512_bf16"]]'
    assert CPU.digest == f"isotherm-{hashlib.sha256(text).hexdigest()[:12]}"


@pytest.mark.parametrize("field", OTHER)
def test_a_worker_that_differs_is_refused_by_name(field: str):
    numerics = ClusterNumerics("refuse")
    numerics.admit("attention-0", CPU)
    numerics.admit("expert-0", CPU)
    before = numerics.as_dict()
    with pytest.raises(
        NumericsError,
        match=rf"^expert-1 is refused.*: [a-z ]+ {OTHER[field]}, not {getattr(CPU, field)}\. .*mixed: allow",
    ):
        numerics.admit("expert-1", replace(CPU, **{field: OTHER[field]}))
    assert numerics.as_dict() == before and numerics.system_fingerprint == CPU.digest
    numerics.admit("expert-1", CPU)


def test_all_that_differs_is_told():
    numerics = ClusterNumerics("refuse")
    numerics.admit("attention-0", CPU)
    with pytest.raises(
        NumericsError, match=r"weights fedcba9876543210, not 0123456789abcdef; kernels reference, not native\. "
    ):
        numerics.admit("attention-1", replace(CPU, weights=OTHER["weights"], kernels="reference"))


def test_shards_on_gpus_and_groups_on_cpus_are_one_cluster():
    """The manifest's choice, and for every worker of a role the same. What both read must agree all the same."""
    numerics = ClusterNumerics("refuse")
    numerics.admit("attention-0", GPU)
    numerics.admit("expert-0", CPU)
    numerics.admit("expert-1", CPU)
    with pytest.raises(NumericsError, match="instruction set avx2, not avx512_bf16"):
        numerics.admit("expert-2", replace(CPU, instructions="avx2"))
    with pytest.raises(NumericsError, match="instruction set sm_100, not sm_90"):
        numerics.admit("attention-1", replace(GPU, instructions="sm_100"))
    for field in ("weights", "dtype", "kept"):
        with pytest.raises(NumericsError, match=f"{OTHER[field]}, not "):
            numerics.admit("expert-2", replace(CPU, **{field: OTHER[field]}))
    assert numerics.system_fingerprint not in (CPU.digest, GPU.digest, "")


def test_mixed_workers_are_allowed_where_the_manifest_says_so_and_replies_say_so():
    numerics = ClusterNumerics("allow")
    numerics.admit("attention-0", CPU)
    assert numerics.system_fingerprint == CPU.digest
    numerics.admit("expert-0", replace(CPU, instructions="avx2"))
    mixed = numerics.system_fingerprint
    assert re.fullmatch(r"isotherm-[0-9a-f]{12}-mixed", mixed) and CPU.digest not in mixed
    numerics.admit("expert-1", replace(CPU, instructions="avx2"))
    numerics.admit("expert-2", CPU)
    assert numerics.system_fingerprint == mixed and len(numerics.as_dict()["numerics"]) == 2


@pytest.mark.parametrize("order", list(itertools.permutations([CPU, GPU])))
def test_the_order_of_arrival_does_not_matter(order: tuple[Fingerprint, ...]):
    numerics = ClusterNumerics("refuse")
    for i, found in enumerate(order):
        numerics.admit(f"worker-{i}", found)
    other = ClusterNumerics("refuse")
    other.admit("a", GPU)
    other.admit("b", CPU)
    assert numerics.system_fingerprint == other.system_fingerprint


@pytest.mark.parametrize("workers", [[], [CPU], [GPU, CPU], [CPU, replace(CPU, instructions="avx2"), GPU]])
def test_a_controller_that_comes_back_holds_to_what_held(workers: list[Fingerprint]):
    before, after = ClusterNumerics("allow"), ClusterNumerics("allow")
    for i, found in enumerate(workers):
        before.admit(f"worker-{i}", found)
    after.restore(before.dump())
    assert after.as_dict() == before.as_dict()
    strict = ClusterNumerics("refuse")
    strict.restore(before.dump())
    for found in workers[:1]:
        with pytest.raises(NumericsError):
            strict.admit("late", replace(found, weights="other"))


def test_before_the_first_worker_there_is_no_fingerprint():
    assert ClusterNumerics("refuse").system_fingerprint == ""


# --- what the weights are -------------------------------------------------------------------------


def digest(path: Path) -> str:
    return Checkpoint.open(path).digest()


def test_the_weights_digest_depends_on_neither_path_nor_time_nor_files(tmp_path: Path):
    one = make_checkpoint(tmp_path / "one", fp8=True, mtp=True)
    many = make_checkpoint(tmp_path / "many", fp8=True, mtp=True, shards=3)
    without_mtp = make_checkpoint(tmp_path / "without", fp8=True, shards=2)
    os.utime(one / "model.safetensors", (1, 1))
    assert digest(one) == digest(many) and re.fullmatch(r"[0-9a-f]{16}", digest(one))
    assert Checkpoint.open(without_mtp).config.num_nextn_predict_layers == 0 and digest(without_mtp) == digest(one)


def negated(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: -tensors[name]})


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.7.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_other_weights_have_another_digest(tmp_path: Path, name: str):
    assert digest(make_checkpoint(tmp_path / "a")) != digest(make_checkpoint(tmp_path / "b", change=negated(name)))


def test_other_ways_to_compute_or_to_store_have_another_digest(tmp_path: Path):
    tensors = make_tensors(make_config())
    changes = ({}, {"rope_theta": 5e4}, {"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"topk_group": 3})
    written = [write_checkpoint(tmp_path / f"{i}", make_config(c), tensors) for i, c in enumerate(changes)]
    digests = set(map(digest, written))
    digests |= {
        digest(make_checkpoint(tmp_path / "f32", dtype="float32")),
        digest(make_checkpoint(tmp_path / "fp8", fp8=True)),
    }
    assert len(digests) == 7
    assert digest(write_checkpoint(tmp_path / "eos", make_config({"eos_token_id": 7}), tensors)) in digests, (
        "it decides no logit"
    )


def test_a_large_checkpoint_costs_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every tensor but the experts', and experts spread over the model, are looked at."""
    monkeypatch.setattr(checkpoint_module, "SAMPLED_TENSORS", 60)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    names = list(checkpoint.tensors)
    parted = {wanted: sorted(n for n in names if (".mlp.experts." in n) == wanted) for wanted in (False, True)}
    chosen = checkpoint_module.sampled(parted[False], parted[True])
    experts = [name for name in chosen if ".experts." in name]
    assert len(chosen) <= 60 and {n for n in names if ".mlp.experts." not in n} <= set(chosen)
    assert {name.split(".")[2] for name in experts} == {"1", "2"} and len(experts) > 10
    assert {name.split(".")[-2] for name in experts} == {"gate_proj", "up_proj", "down_proj"}
    read: list[int] = []
    sample = checkpoint_module._sample
    monkeypatch.setattr(checkpoint_module, "_sample", lambda *given: read.append(len(sample(*given))) or sample(*given))
    checkpoint.digest()
    assert len(read) == len(chosen) and max(read) == checkpoint_module.SAMPLE_BYTES


def test_a_file_that_is_gone_is_named(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cannot be read"):
        checkpoint.digest()


def test_what_an_earlier_release_has_written_is_no_fingerprint():
    before, after = ClusterNumerics("refuse"), ClusterNumerics("refuse")
    before.admit("a", CPU)
    old = json.loads(before.dump())
    del old[0]["kept"]
    after.restore(json.dumps(old))
    after.admit("b", replace(CPU, weights="other"))  # is the first one
