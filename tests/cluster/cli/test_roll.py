"""`isotherm roll`: what it asks for, and its exit status."""

from __future__ import annotations

import importlib
import json

import pytest
from fake_admin import FakeAdmin
from fake_engine import FakeEngine, http_server
from typer.testing import CliRunner

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import main as cli
from isotherm.cluster.model.path import bundled_model

roll_command = importlib.import_module("isotherm.cluster.cli.roll")  # its name is a function of the package main too


def test_it_asks_for_a_directory():
    app = build_app(FakeEngine(100), None, "m", admin=FakeAdmin())  # type: ignore[arg-type]
    with http_server(app) as url:
        done = [CliRunner().invoke(cli.app, ["roll", model, "--url", url, "--dry-run", "--json"])
                for model in ("tiny", "/not/here/but/there")]  # fmt: skip
    asked = [json.loads(one.stdout)["target"] for one in done]
    assert [body["model"] for body in asked] == [str(bundled_model()), "/not/here/but/there"]
    assert all(body["dry_run"] and body["idempotency_key"] for body in asked)


def test_it_wants_a_model_or_the_ingress():
    done = CliRunner().invoke(cli.app, ["roll"])
    assert done.exit_code == 2 and "give the MODEL to serve, --manifest, or --ingress" in " ".join(done.stderr.split())


def test_it_sends_a_manifest_as_its_file_says(tmp_path):
    path = tmp_path / "new.yaml"
    path.write_text("engine: {kv_memory: 32MiB}\nautoscaling: {mode: off}\n")
    app = build_app(FakeEngine(100), None, "m", admin=FakeAdmin())  # type: ignore[arg-type]
    with http_server(app) as url:
        asked = ["roll", "--manifest", str(path), "--url", url, "--json"]
        done = [CliRunner().invoke(cli.app, [*asked, *more]) for more in ([], ["tiny", "--expert-groups", "1"])]
    alone, both = (json.loads(one.stdout)["target"] for one in done)
    assert alone["manifest"] == {"engine": {"kv_memory": "32MiB"}, "autoscaling": {"mode": False}}
    assert "model" not in alone and both["model"] == str(bundled_model()) and both["expert_groups"] == 1


def test_a_manifest_that_is_wrong_is_not_sent(tmp_path):
    path = tmp_path / "new.yaml"
    path.write_text("engine: {kv_memoy: 32MiB}\n")
    done = CliRunner().invoke(cli.app, ["roll", "--manifest", str(path), "--url", "http://127.0.0.1:1"])
    assert done.exit_code == 1 and f"{path}: engine.kv_memoy" in " ".join(done.stderr.split())
    done = CliRunner().invoke(cli.app, ["roll", "--ingress", "--manifest", str(path)])
    assert done.exit_code == 2 and "without --manifest" in " ".join(done.stderr.split())


@pytest.mark.parametrize("more", [["--dry-run"], ["--wait"], ["--json"], ["--expert-groups", "1"], ["--deadline", "5"]])
def test_what_an_update_of_the_ingress_does_not_take_is_not_passed_over(monkeypatch, more):
    """With --dry-run it replaced the replicas."""
    replaced: list[object] = []
    monkeypatch.setattr(roll_command, "_update_ingress", lambda *given: replaced.append(given))
    done = CliRunner().invoke(cli.app, ["roll", "--ingress", *more])
    assert done.exit_code == 2 and f"--ingress takes no {more[0]}" in " ".join(done.stderr.split())
    assert not replaced and CliRunner().invoke(cli.app, ["roll", "--ingress"]).exit_code == 0 and len(replaced) == 1
