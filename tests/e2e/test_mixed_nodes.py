"""A worker on a node that computes other bits is refused by name, and everything goes on without it. The nodes differ
in what torch uses of the processor, of which the reference kernels' results are made. Beside it all stands a foreign
Ray's address."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from ray_nodes import RayNodes
from served import Served

from isotherm.cluster.client import Client

pytestmark = pytest.mark.long

PLAIN = {"ATEN_CPU_CAPABILITY": "default"}
MANIFEST = {
    "kernels": "reference",
    "attention": {"cpus": 1, "threads": 1},
    "experts": {"groups": 1, "cpus": 1, "threads": 1},
    "autoscaling": {"mode": "off"},
}
FOREIGN = "192.0.2.1:6379"


@pytest.fixture
def foreign_ray(monkeypatch: pytest.MonkeyPatch):
    """As the Ray of somebody else leaves it, where any Ray of this machine looks."""
    with tempfile.TemporaryDirectory(prefix="f-", ignore_cleanup_errors=True) as folder:
        written = Path(folder) / "ray" / "ray_current_cluster"
        written.parent.mkdir()
        written.write_text(FOREIGN)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield written
    monkeypatch.undo()


def test_a_worker_that_would_compute_other_bits_is_refused(foreign_ray: Path, tmp_path: Path):
    assert torch.backends.cpu.get_cpu_capability() != "DEFAULT", "this processor has nothing to leave out"
    with RayNodes() as nodes:
        nodes.add(2)
        with Served(MANIFEST, tmp_path, "--address", nodes.address) as served, Client(served.url) as client:
            before, numerics = client.chat("What is 3 + 4?", temperature=0).text, served.status()["numerics"]
            assert [n["kernels"] for n in numerics["numerics"]] == ["reference"]
            nodes.add(2, PLAIN)
            operation = client.wait_for_operation(client.scale(expert_groups=2)["id"], timeout=90)
            reasons = " ".join(operation["reasons"])
            assert operation["phase"] == "rolled_back" and "expert-1 is refused" in reasons, operation
            assert "instruction set DEFAULT" in reasons and "mixed: allow" in reasons
            assert client.chat("What is 3 + 4?", temperature=0).text == before
            status = served.status()
            assert [w["id"] for w in status["workers"]] == ["attention-0", "expert-0"]
            assert status["numerics"] == numerics
            fingerprints = {w["fingerprint"] for w in status["workers"]}
            assert fingerprints == {numerics["system_fingerprint"]}
        assert served.left_over() == {"processes": [], "shared memory": []}
    assert foreign_ray.read_text() == FOREIGN and os.listdir(foreign_ray.parent) == [foreign_ray.name]
