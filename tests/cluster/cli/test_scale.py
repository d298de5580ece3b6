"""`isotherm scale`: what it says while it waits, and at the end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_admin import FakeAdmin
from fake_engine import FakeEngine, http_server
from typer.testing import CliRunner

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import main as cli
from isotherm.cluster.cli import views
from isotherm.cluster.messages.operations import summed_up

WAITS = [f"expert-{i} waits for a node with 0.1 CPU; free in the whole cluster: 0 CPU" for i in range(3, 60)]
REASON = "not within 8 s, its deadline: expert-3 waits for a node with 0.1 CPU"


class FullAdmin(FakeAdmin):
    """Of a machine with no more room: an operation waits for a few looks, and is rolled back."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    async def operation(self, operation_id: str) -> dict[str, Any]:
        self.looks += 1
        waits = {"id": operation_id, "plan": ["start expert-3"], "phase": "planned", "reasons": [], "waiting": WAITS}
        return waits if self.looks < 5 else waits | {"phase": "rolled_back", "reasons": [REASON], "waiting": []}


@pytest.mark.parametrize("command", [("scale", "--expert-groups", "60"), ("roll", "tiny")])
def test_what_is_waited_for_is_said_once_and_the_deadline_at_the_end(monkeypatch, command):
    monkeypatch.setattr(views, "WAIT_SECONDS", 0.15)
    app = build_app(FakeEngine(100), None, "m", admin=FullAdmin())  # type: ignore[arg-type]
    with http_server(app) as url:
        done = CliRunner().invoke(cli.app, [*command, "--url", url, "--wait", "--json"])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [f"op-1: {WAITS[0]}; 56 more wait too"]
    assert json.loads(done.stdout)["reasons"] == [REASON]


def test_who_is_done_soon_says_nothing():
    app = build_app(FakeEngine(100), None, "m", admin=FullAdmin())  # type: ignore[arg-type]
    with http_server(app) as url:
        done = CliRunner().invoke(cli.app, ["scale", "--expert-groups", "60", "--url", url, "--wait", "--json"])
    assert done.exit_code == 1 and done.stderr == ""


def test_waits_are_summed_up():
    assert [summed_up(WAITS[:n]) for n in (0, 1, 3)] == ["", WAITS[0], f"{WAITS[0]}; 2 more wait too"]
