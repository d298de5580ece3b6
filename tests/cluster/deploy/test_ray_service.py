"""What KubeRay's entry refuses before it starts anything; tests/e2e/test_kubernetes.py has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from isotherm.cluster.api.access.keys_file import KeysFileError
from isotherm.cluster.deploy.ray_service import Arguments, application
from isotherm.cluster.supervise.supervisor import ServeError


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_needs_keys_wherever_its_manifest_says_that_it_listens(tmp_path: Path, host: str):
    """For serveConfigV2 has the last word."""
    (tmp_path / "m.yaml").write_text(f"http: {{host: {host}}}")
    with pytest.raises(ServeError, match=r"it needs http\.keys; make keys with `isotherm keys create"):
        application(Arguments(manifest=str(tmp_path / "m.yaml")))


def test_it_needs_keys_that_can_be_read(tmp_path: Path):
    (tmp_path / "m.yaml").write_text(f"http: {{keys: {tmp_path}/none.json}}")
    with pytest.raises(KeysFileError, match="none.json: cannot be read"):
        application(Arguments(manifest=str(tmp_path / "m.yaml")))
