"""What a local Ray can never hold is refused: by its memory before anything is started, by its resources at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from deepseek_checkpoints import make_checkpoint

from isotherm.cluster.deploy.capacity import (
    check_machine,
    check_resources,
    least_weights,
    selects,
)
from isotherm.cluster.manifest import ManifestError, parse_manifest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model

GIB = 1 << 30
TOTAL = {"CPU": 2.0, "memory": 8.0 * GIB, "node:__internal_head__": 1.0}


def refused(fields: dict[str, Any], memory: int = 16 * GIB, cpus: int = 2, path: Path | None = None) -> str:
    with pytest.raises(ManifestError) as error:
        check_machine(parse_manifest(fields), path or bundled_model(), memory, cpus)
    return str(error.value)


def test_a_cache_that_no_machine_has_is_refused():
    message = refused({"engine": {"kv_memory": "900TiB"}})
    assert "engine.kv_memory is 900.0 TiB" in message and "this machine has 16.0 GiB" in message
    assert "give less to engine.kv_memory" in message


def test_the_caches_of_all_shards_count():
    check_machine(
        parse_manifest({"engine": {"kv_memory": "7GiB"}, "attention": {"shards": 2}}), bundled_model(), 16 * GIB, 2
    )
    assert "for each of 3 attention shard(s)" in refused(
        {"engine": {"kv_memory": "7GiB"}, "attention": {"shards": 3, "cpus": 0}}
    )


def test_weights_count_as_little_as_they_can_take(tmp_path: Path):
    path = make_checkpoint(tmp_path)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    manifest = {"engine": {"kv_memory": "1MiB"}}
    assert "give the --address" in refused(manifest, stored // 4, path=path)
    check_machine(parse_manifest(manifest), path, stored + (1 << 20), 2)


def test_a_layer_that_drafts_counts(tmp_path: Path):
    path = make_checkpoint(tmp_path, dtype="bfloat16", mtp=True)
    needed = {}
    for kind in ("off", "auto"):
        found = re.search(r"with the weights, ([0-9.]+) KiB at the least", refused(
            {"engine": {"kv_memory": "1MiB"}, "speculation": {"kind": kind}}, 1 << 10, path=path))  # fmt: skip
        assert found is not None
        needed[kind] = float(found[1])
    assert needed["auto"] > 1.2 * needed["off"]


def test_what_is_on_gpus_does_not_count():
    fields = {"device": "cuda", "engine": {"kv_memory": "60GiB"}, "attention": {"gpus": 1}}
    check_machine(parse_manifest(fields), bundled_model(), 16 * GIB, 2)


def test_more_cpus_than_there_are_is_refused_before_ray():
    message = refused({"attention": {"cpus": 64}})
    assert (
        "attention.cpus is 64 for each of 1 shard(s)" in message and "has 2 CPUs" in message and "--address" in message
    )


@pytest.mark.parametrize(("fields", "words"), [
    ({"attention": {"cpus": 2}}, "attention.cpus is 2 .* experts.cpus 0.25 for each of 2 .* 2.5 in all, .* has 2 CPUs"),
    ({"experts": {"groups": 9}}, "experts.cpus 0.25 for each of 9 group"),
    ({"attention": {"gpus": 0.5}}, "attention.gpus is 0.5 .* has 0 GPUs"),
    ({"experts": {"memory": "5GiB"}}, "experts.memory 5.0 GiB .* 10.0 GiB in all, .* has 8.0 GiB of memory"),
    ({"attention": {"labels": {"role": "attention"}}}, 'attention.labels has role: "attention", and no node'),
    ({"experts": {"labels": {"ray.io/node-id": "!in(abc)"}}}, "experts.labels has ray.io/node-id"),
])  # fmt: skip
def test_what_ray_says_that_it_has_not_is_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ManifestError, match=words):
        check_resources(parse_manifest(fields), TOTAL, [{"ray.io/node-id": "abc"}])


@pytest.mark.parametrize("fields", [
    {}, {"attention": {"cpus": 1.5}, "experts": {"cpus": 0.25}},
    {"attention": {"cpus": 0.1}, "experts": {"groups": 19, "cpus": 0.1}},
    {"attention": {"memory": "4GiB"}, "experts": {"memory": "2GiB"}},
    {"experts": {"labels": {"role": "!gpu", "ray.io/node-id": "abc"}}},
])  # fmt: skip
def test_what_fits_exactly_is_taken(fields: dict[str, Any]):
    check_resources(parse_manifest(fields), TOTAL, [{"ray.io/node-id": "abc"}])


@pytest.mark.parametrize(("selector", "value", "found"), [
    ("a", "a", True), ("a", "b", False), ("a", None, False), ("!a", "a", False), ("!a", "b", True), ("!a", None, True),
    ("in(a,b)", "b", True), ("in(a, b)", "b", True), ("in(a,b)", "c", False), ("!in(a,b)", "c", True),
    ("!in(a,b)", "a", False),
])  # fmt: skip
def test_label_selectors_are_rays(selector: str, value: str | None, found: bool):
    assert selects(selector, value) is found


def test_each_shard_has_weights_of_its_own_and_the_experts_are_there_once():
    manifest, checkpoint = parse_manifest({}), Checkpoint.open(bundled_model())
    one, two = (least_weights(manifest, checkpoint, shards) for shards in (1, 2))
    assert 0 < two - one < one
    on_gpus = parse_manifest({"device": "cuda", "attention": {"gpus": 1}})
    assert least_weights(on_gpus, checkpoint, 2) == one - (two - one)
