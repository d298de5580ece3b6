from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isotherm.cluster.api.access.hashing import matches
from isotherm.cluster.api.access.keys_file import read_keys
from isotherm.cluster.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "120"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "k.json"


def test_a_key_is_shown_once_and_never_kept(file: Path):
    made = run("create", "ann", "--file", str(file))
    key = made.stdout.strip()
    assert made.exit_code == 0 and key.startswith("iso-") and "not shown again" in made.stderr
    (entry,) = read_keys(file)
    assert matches(key, entry.hash) and key[13:] not in file.read_text() and entry.roles == ["use"]
    assert os.stat(file).st_mode & 0o777 == 0o600
    listed = run("list", "--file", str(file))
    assert "ann" in listed.stdout and key not in listed.stdout and entry.hash not in listed.stdout
    (told,) = json.loads(run("list", "--file", str(file), "--json").stdout)
    assert told["name"] == "ann" and "hash" not in told


def test_roles_and_limits(file: Path):
    limits = ["--requests-per-minute", "60", "--streams", "4", "--weight", "0.5", "--priority", "-2", "--tenant", "t"]
    roles = ["--role", "admin", "--role", "use"]
    assert run("create", "ops", "--file", str(file), *roles, *limits, "--model", "m", "--n", "2").exit_code == 0
    (entry,) = read_keys(file)
    assert entry.roles == ["admin", "use"] and entry.models == ["m"] and entry.priority == -2 and entry.tenant == "t"
    assert (entry.requests_per_minute, entry.streams, entry.weight, entry.n) == (60, 4, 0.5, 2)
    assert "requests_per_minute 60" in run("list", "--file", str(file)).stdout.replace("\n", " ")


def test_a_revoked_key_is_gone_and_others_stay(file: Path):
    for name in ("ann", "bob", "eve"):
        run("create", name, "--file", str(file))
    (_, bob, _) = read_keys(file)
    assert "ann" in run("revoke", "ann", "--file", str(file)).stdout
    assert run("revoke", bob.id, "--file", str(file)).exit_code == 0
    assert [entry.name for entry in read_keys(file)] == ["eve"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "ann"], "there is a key 'ann' already"),
        (["create", "two words"], "name: 'two words' must be 1 to 63 letters, digits, "),
        (["create", "bob", "--weight", "0"], "weight: "),
        (["revoke", "nobody"], "there is no key 'nobody'"),
    ],
)
def test_mistakes_are_a_message_and_change_nothing(file: Path, arguments: list[str], words: str):
    run("create", "ann", "--file", str(file))
    before = file.read_bytes()
    refused = run(*arguments, "--file", str(file))
    assert refused.exit_code == 1 and words in refused.output and file.read_bytes() == before


def test_a_file_that_is_none_is_left_alone(file: Path):
    file.write_text("{")
    for command in (["create", "bob"], ["list"], ["revoke", "ann"]):
        assert run(*command, "--file", str(file)).exit_code == 1
    assert file.read_text() == "{"


def test_a_role_that_there_is_none_of(file: Path):
    assert run("create", "ann", "--file", str(file), "--role", "root").exit_code == 2 and not file.exists()
