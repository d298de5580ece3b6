"""The Dockerfile of manifests/kuberay, read line by line: its steps, and what goes into the image. To build it needs
Docker, which is not here."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from setuptools.config.pyprojecttoml import load_file

from isotherm.cluster.cli.main import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "manifests" / "kuberay" / "Dockerfile").read_text()
PROJECT = load_file(ROOT / "pyproject.toml")


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each, continued lines joined."""
    text = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def run_with(words: str) -> str:
    (found,) = [rest for name, rest in instructions() if name == "RUN" and words in rest]
    return found


def ignored(path: str) -> bool:
    """As .dockerignore has it, for the patterns that it has."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    parts = path.split("/")
    for pattern in patterns:
        assert "/" not in pattern.removeprefix("**/") and not pattern.startswith("!"), "this test knows no others"
        at = parts if pattern.startswith("**/") else parts[:1]
        if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in at):
            return True
    return False


def test_the_user_is_the_images_own_and_only_the_systems_packages_need_another():
    assert [rest for name, rest in instructions() if name == "USER"] == []
    assert all("--chown=ray " in rest for name, rest in instructions() if name == "COPY")
    for command in re.split(r"&&", run_with("apt-get")):
        assert command.split()[0] == "sudo"
    assert "sudo" not in run_with("pip install")
    folders = [rest for name, rest in instructions() if name == "WORKDIR"]
    assert folders == ["/home/ray/isotherm", "/home/ray"] and run_with("mkdir") == f"mkdir {folders[0]}"


def test_the_order_is_compiler_sources_install_trial():
    words = ["g++", "mkdir", "pip install", "isotherm generate"]
    at = [next(i for i, (name, rest) in enumerate(instructions()) if name == "RUN" and word in rest) for word in words]
    copies = [i for i, (name, _) in enumerate(instructions()) if name == "COPY"]
    assert at == sorted(at) and at[1] < min(copies) and max(copies) < at[2]


def test_what_is_built_of_is_copied_and_not_ignored():
    copied = [source for name, rest in instructions() if name == "COPY" for source in rest.split()[1:-1]]
    assert not any(ignored(source) for source in copied)
    (extension,) = PROJECT["tool"]["setuptools"]["ext-modules"]
    data = PROJECT["tool"]["setuptools"]["package-data"]
    folders = {package: ROOT.joinpath(*package.split(".")[1:]) for package in data}
    files = [ROOT / source for source in extension["sources"]]
    files += [path for package, globs in data.items() for glob in globs for path in folders[package].glob(glob)]
    files += [path for name in ("actors", "cluster", "kernels", "manifests") for path in (ROOT / name).rglob("*.py")]
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():  # such as what Python leaves of a module
            continue
        assert path.exists() and name.split("/")[0] in copied and not ignored(name), name


@pytest.mark.parametrize(
    "path", [".git", ".venv", ".venv-clients", "kernels/native/_native.cpython-311-x86_64-linux-gnu.so",
             "cluster/__pycache__", "build", "isotherm.egg-info"],
)  # fmt: skip
def test_what_a_checkout_has_made_is_not_sent(path: str):
    assert ignored(path)


def test_its_arguments_are_declared_where_they_are_used():
    names = [rest.partition("=")[0] for name, rest in instructions() if name == "ARG"]
    assert names == ["BASE", "EXTRAS", "PIP_EXTRA"]
    kinds = [name for name, _ in instructions()]
    assert kinds[:2] == ["ARG", "FROM"] and dict(instructions())["FROM"] == "${BASE}", "what comes before FROM is gone"
    assert set(re.findall(r"\$\{(\w+)\}", run_with("pip install"))) == {"EXTRAS", "PIP_EXTRA"}
    assert shlex.split(run_with("pip install")) == ["pip", "install", "--no-cache-dir", "${PIP_EXTRA}", ".${EXTRAS}"]
    told = re.findall(r"EXTRAS=\[([\w-]+)\]", TEXT)
    assert told and set(told) <= set(PROJECT["project"]["optional-dependencies"])


def test_the_commands_that_are_told_are_words_of_a_shell():
    """zsh takes brackets for a pattern of files, and refuses one that nothing matches."""
    assert re.findall(r'(?<!")EXTRAS=\[', TEXT) == []


def test_the_trial_is_a_command_that_there_is():
    trial = shlex.split(run_with("isotherm generate").partition("&& isotherm ")[2])
    group: Any = typer.main.get_command(app)
    command = group.commands[trial[0]]
    with command.make_context(trial[0], trial[1:]) as context:
        assert context.params["kernels"] == "native" and context.params["max_tokens"] == 4


def test_gpus_have_one_nccl():
    """PyPI's torch 2.13 requires nvidia-nccl-cu13, and both packages have one library file."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert [r for r in extras["gpu"] if "nccl" in r] == []
    assert set(extras["gpu-cu12"]) == {*extras["gpu"], "nvidia-nccl-cu12"}
    told = re.findall(r"'\.\[([\w-]+)\]'", (ROOT / "README.md").read_text())
    assert {"gpu", "gpu-cu12"} <= set(told) <= set(extras)
