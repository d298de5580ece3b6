"""`isotherm doctor`: what it prints, and its exit status."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from isotherm.cluster.cli import doctor
from isotherm.cluster.cli.doctor import report, show
from isotherm.cluster.doctor.finding import fail, ok, warn
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.path import bundled_model

MANIFEST = parse_manifest({"http": {"port": 18999}})
FOUND = [fail("memory", "[red]none", "buy some"), ok("cores", "8 cores"), warn("disk", "full", "clean up")]


def test_what_is_wrong_comes_last_and_with_what_to_do():
    console = Console(width=80, record=True, file=io.StringIO())
    show(FOUND, console)
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "warn", "→", "fail", "→", "1"]
    assert "[red]none" in lines[3] and "it will not work as it is" in lines[-1]


@pytest.mark.parametrize(("findings", "status"), [(FOUND, 1), (FOUND[1:], 0)])
def test_the_exit_status_says_whether_it_will_work(monkeypatch, capsys, findings, status):
    monkeypatch.setattr(doctor, "examine_machine", lambda manifest, path: findings)
    assert report(MANIFEST, None, None, None) == status
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == [f.state.value for f in findings]


def test_this_machine_with_the_bundled_model():
    found = doctor.examine_machine(MANIFEST, bundled_model())
    subjects = [finding.subject for finding in found]
    assert {"cores", "kernels", "memory", "shared memory", "open files", "disk", "front door", "ports",
            "proxies", "python", "ray", "torch", "checkpoint"} <= set(subjects)  # fmt: skip
    assert len(subjects) == len(set(subjects))


def test_the_folder_of_batches_is_looked_at_as_serve_looks_at_it(tmp_path):
    (tmp_path / "kept").touch()
    manifest = parse_manifest({"http": {"batches": {"folder": str(tmp_path / "kept")}}})
    assert [f.state.value for f in doctor.examine_machine(manifest, None) if f.subject == "batches"] == ["fail"]
