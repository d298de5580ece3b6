"""What `make` and .ci/private run on a machine on which nothing has run before."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is needed")


def told(folder: Path, *arguments: str) -> list[str]:
    """The commands that make would run in a folder with this Makefile and nothing else of what it makes."""
    (folder / "tests" / "clients").mkdir(parents=True, exist_ok=True)
    for needed in ("pyproject.toml", "tests/clients/requirements.txt"):
        (folder / needed).touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@needs_make
@pytest.mark.parametrize(
    ("model", "word"), [("/my models/x", "'/my models/x'"), ("it's", "'it'\\''s'"), ("tiny", "'tiny'")]
)
def test_a_model_is_one_word(tmp_path: Path, model: str, word: str):
    assert told(tmp_path, "serve", f"MODEL={model}")[-1] == f".venv/bin/isotherm serve {word}"


@needs_make
def test_no_model_is_the_bundled_one_and_options_follow_it(tmp_path: Path):
    assert told(tmp_path, "serve", "MODEL=", "ARGS=--port 8001")[-1] == ".venv/bin/isotherm serve 'tiny' --port 8001"


@needs_make
def test_a_folder_with_a_space_is_one_word(tmp_path: Path):
    (folder := tmp_path / "my folder").mkdir()
    assert told(folder, "clients")[-1].endswith(f" '{folder}/.venv-clients/bin/python'")


@needs_make
@pytest.mark.parametrize(
    ("target", "folder"), [("serve", ".venv"), ("test-fast", ".venv"), ("clients", ".venv-clients")]
)
def test_an_environment_without_pip_is_made_whole(tmp_path: Path, target: str, folder: str):
    """As it is left where python3-venv is missing: with Python, and nothing to install with."""
    making = f"test -x {folder}/bin/pip || python3 -m venv {folder}"
    assert making in told(tmp_path, target, "PYTHON=python3")


def test_a_private_machine_needs_no_home():
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "PIP_CACHE_DIR")}
    command = [str(ROOT / ".ci" / "private"), "sh", "-c", 'test -d "$HOME" && test -z "$(ls -A "$HOME")"']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
