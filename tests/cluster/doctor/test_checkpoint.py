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


def test_one_of_which_chats_cannot_be_had(tmp_path):
    """Without tokenizer_config.json, which names the token that its template begins with."""
    for file in bundled_model().iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors") and file.name != "tokenizer_config.json":
            (tmp_path / file.name).symlink_to(file)
    found = check_checkpoint(MANIFEST, tmp_path, 64 << 30, 8)
    assert [f.state.value for f in found] == ["ok", "ok", "warn"]
    assert found[-1].subject == "chat template" and "it wants bos_token, eos_token, which tok" in found[-1].words
