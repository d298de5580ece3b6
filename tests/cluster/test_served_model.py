from __future__ import annotations

import pytest

from isotherm.cluster.manifest import ManifestError
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.served_model import served_model


def test_a_model_or_a_manifest(tmp_path, monkeypatch):
    manifest, path = served_model("tiny", port=9000, host=None)
    assert (manifest.model_id, manifest.http.port, manifest.http.host) == ("tiny", 9000, "127.0.0.1")
    assert path == bundled_model()
    (tmp_path / "m.yaml").write_text("model: tiny\nserved_name: mine\nhttp: {port: 9001, host: 0.0.0.0}\n")
    manifest, path = served_model(str(tmp_path / "m.yaml"), port=9000)
    assert (manifest.model_id, manifest.http.port, manifest.http.host) == ("mine", 9000, "0.0.0.0")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert served_model("~/m.yaml")[0] == served_model(str(tmp_path / "m.yaml"))[0]
    monkeypatch.chdir(bundled_model())
    assert served_model(".")[0].model_id == "tiny"  # by the directory's own name


def test_what_is_none_is_said(tmp_path):
    with pytest.raises(ManifestError, match=r"command line: http\.port"):
        served_model("tiny", port=0)
    with pytest.raises(ManifestError, match="cannot be read"):
        served_model(str(tmp_path / "none.yaml"))
