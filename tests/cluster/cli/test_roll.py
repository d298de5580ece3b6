"""`isotherm roll`: what it asks for, and its exit status."""

from __future__ import annotations

import json

from fake_admin import FakeAdmin
from fake_engine import FakeEngine, http_server
from typer.testing import CliRunner

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import main as cli
from isotherm.cluster.model.path import bundled_model


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
    assert done.exit_code == 2 and "give the MODEL to serve, or --ingress" in " ".join(done.stderr.split())
