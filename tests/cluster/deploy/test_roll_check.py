"""Which model may take the place of another, and whether there is room beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from other_weights import other_weights

from isotherm.cluster.deploy.roll_check import Values, check_successor, memory_room, resource_room, wanted_values
from isotherm.cluster.deploy.rolled_values import as_operated
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.operations import OperationError
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model

MANIFEST = parse_manifest({})


def refused(path: Path) -> str:
    with pytest.raises(OperationError) as error:
        check_successor(Values(MANIFEST), Checkpoint.open(bundled_model()), path)
    assert error.value.field == "model" and not error.value.conflict
    return str(error.value)


def test_other_weights_are_taken(tmp_path: Path):
    path = other_weights(tmp_path / "other")
    assert check_successor(Values(MANIFEST), Checkpoint.open(bundled_model()), path).path == path


def test_what_cannot_take_its_place_is_named(tmp_path: Path):
    assert "rope" in refused(other_weights(tmp_path / "rope", rope_theta=5000.0))
    template = other_weights(tmp_path / "template")
    (template / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja is another" in refused(template)
    assert "config.json" in refused(tmp_path / "none")


def test_the_same_weights_are_no_other_ones():
    assert "served already" in refused(bundled_model())


def test_too_little_memory_is_refused_and_unknown_memory_is_not():
    assert memory_room(5, 5, 10).lacks == [] and not memory_room(5, 5, None).hopeless
    short = memory_room(5, 6, 10)
    assert "it does not fit: memory beside what serves" in short.lacks[0]
    with pytest.raises(OperationError) as error:
        short.refuse()
    assert error.value.conflict


def test_too_few_resources_can_be_waited_for():
    workers = [{"CPU": 0.5}, {"CPU": 0.25, "GPU": 1.0}]
    assert resource_room(workers, {"CPU": 0.75, "GPU": 1.0}).lacks == []
    short = resource_room(workers, {"CPU": 2.0})
    assert short.lacks[0].startswith("it does not fit now: 0.75 CPU of which 2 are free, 1 GPU of which 0 are free")
    short.refuse()
    assert resource_room([{}], {}).words == []


# --- a manifest's values --------------------------------------------------------------------------


def test_a_manifest_gives_workers_its_values_and_leaves_the_rest():
    running = parse_manifest({"served_name": "shown", "engine": {"kv_memory": "64MiB"}, "http": {"port": 8001}})
    given = {
        "model": "/elsewhere",
        "isa": "avx2",
        "engine": {"kv_memory": "32MiB", "shared_prefix_cache": True},
        "attention": {"shards": 3},
        "http": {"port": 8002},
    }
    values = wanted_values(running, given, other_model=False)
    assert (values.manifest.isa, values.manifest.engine.kv_memory) == ("avx2", 32 << 20)
    stays = values.manifest.model_copy(update={"isa": running.isa, "engine": running.engine})
    assert stays == running, "what does not concern workers"
    assert values.words() == [
        'change isa: "auto" → "avx2"',
        "change engine.kv_memory: 67108864 → 33554432",
        'leave model: "tiny" → "/elsewhere" (by isotherm roll MODEL)',
        'leave served_name: "shown" → null (by isotherm roll --ingress FILE)',
        "leave attention.shards: 1 → 3 (by isotherm scale)",
        "leave engine.shared_prefix_cache: false → true (by isotherm roll --ingress FILE)",
        "leave http.port: 8001 → 8002 (cannot be rolled: Serve listens there from the cluster's start to its end)",
    ]


def test_with_another_model_its_name_in_the_manifest_does_not_count():
    values = wanted_values(MANIFEST, {"model": "/elsewhere"}, other_model=True)
    assert values == Values(MANIFEST)


def test_words_compare_with_what_operations_have_made_of_the_cluster():
    """A roll said that groups which a scale had brought were still to come, and the model that had been rolled."""
    given = {"engine": {"kv_memory": "64MiB"}, "model": "/models/other", "experts": {"groups": 3}}
    now = as_operated(MANIFEST, shards=1, groups=3, model="/models/other")
    values = wanted_values(MANIFEST, given, other_model=False, now=now)
    assert [change.field for change in values.rolled] == ["engine.kv_memory"] and values.left == []
    behind = wanted_values(MANIFEST, {"isa": "avx2"}, other_model=False, now=now)
    assert [str(change) for change in behind.left] == [
        'model: "/models/other" → "tiny"',
        "experts.groups: 3 → 2",
    ]
    assert behind.manifest.experts.groups == MANIFEST.experts.groups


@pytest.mark.parametrize(("given", "words"), [
    ({}, "has the values that the workers have already"),
    ({"http": {"port": 1}}, "already; leave http.port: 8000 → 1"),
    ({"engine": {"kv_memory": "1x"}}, "engine.kv_memory"),
    ({"kernels": "triton"}, "needs device: cuda"),
])  # fmt: skip
def test_what_is_wrong_with_a_manifest_is_named(given: dict[str, Any], words: str):
    with pytest.raises(OperationError, match=words) as error:
        wanted_values(MANIFEST, given, other_model=False)
    assert error.value.field == "manifest"


def test_the_same_weights_are_taken_with_other_values_that_fit():
    serving = Checkpoint.open(bundled_model())
    other = wanted_values(MANIFEST, {"engine": {"kv_memory": "64MiB"}}, other_model=False)
    assert check_successor(other, serving, serving.path).path == serving.path
    for given, words in (
        ({"engine": {"kv_memory": 1}}, "engine.kv_memory is 1 bytes"),
        ({"speculation": {"kind": "mtp"}}, "would begin the use of the model's multi-token-prediction layer"),
    ):
        with pytest.raises(OperationError, match=words) as error:
            check_successor(wanted_values(MANIFEST, given, other_model=False), serving, serving.path)
        assert error.value.field == "manifest"


def test_a_layer_that_begins_to_draft_is_refused():
    serving = Checkpoint.open(bundled_model())
    drafting = replace(serving, config=replace(serving.config, drafting_layers=1))
    values = wanted_values(MANIFEST, {"speculation": {"kind": "ngram"}}, other_model=False)
    assert check_successor(values, serving, serving.path).path == serving.path
    with pytest.raises(OperationError, match="would end the use of the model's multi-token-prediction layer") as error:
        check_successor(values, drafting, serving.path)
    assert error.value.field == "manifest"
