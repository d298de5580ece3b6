"""Which model may take the place of another, and whether there is room beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from other_weights import other_weights

from isotherm.cluster.deploy.roll_check import check_successor, memory_room, resource_room
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.operations import OperationError
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model

MANIFEST = parse_manifest({})


def refused(path: Path) -> str:
    with pytest.raises(OperationError) as error:
        check_successor(MANIFEST, Checkpoint.open(bundled_model()), path)
    assert error.value.field == "model" and not error.value.conflict
    return str(error.value)


def test_other_weights_are_taken(tmp_path: Path):
    path = other_weights(tmp_path / "other")
    assert check_successor(MANIFEST, Checkpoint.open(bundled_model()), path).path == path


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
