from __future__ import annotations

from isotherm.cluster.doctor.checkpoint import check_checkpoint
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.path import bundled_model

MANIFEST = parse_manifest({"model": "tiny"})


def test_one_that_can_be_served():
    assert [f.state.value for f in check_checkpoint(MANIFEST, bundled_model(), 64 << 30, 8)] == ["ok", "ok"]


def test_one_that_cannot(tmp_path):
    (found,) = check_checkpoint(MANIFEST, tmp_path, 64 << 30, 8)
    assert found.state.value == "fail" and "config.json" in found.advice
    found = check_checkpoint(MANIFEST, bundled_model(), 1 << 20, 8)[-1]
    assert (found.subject, found.state.value) == ("room for it", "fail") and "kv_memory" in found.advice
