"""Where Ray's session goes, and that a folder in which it cannot be is named before anything starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from isotherm.cluster.deploy import session_folder
from isotherm.cluster.deploy.session_folder import check_session_folder, session_trouble
from isotherm.cluster.supervise.supervisor import ServeError


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of temporary files, with a short path."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setenv("TMPDIR", path)
        yield Path(path)


def refused() -> str:
    with pytest.raises(ServeError) as info:
        check_session_folder()
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_folder_with_room_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch):
    check_session_folder()
    assert list(folder.iterdir()) == []
    monkeypatch.delenv("TMPDIR")
    assert session_trouble() == ""


@pytest.mark.parametrize("variable", ["TMPDIR", "TEMP", "TMP"])
def test_one_that_cannot_be_written_is_named_by_its_variable(
    folder: Path, variable: str, monkeypatch: pytest.MonkeyPatch
):
    """Python would take /tmp instead, without a word."""
    (folder / "file").write_text("")
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv(variable, str(folder / "file"))
    assert refused().startswith(
        f"{variable} is {folder}/file, where Ray cannot write its session (Not a directory); set"
    )
    monkeypatch.setenv(variable, str(folder / "none"))
    assert "No such file or directory" in refused()


def test_a_full_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    free = SimpleNamespace(free=session_folder.LEAST_BYTES - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    assert refused().startswith(f"TMPDIR is {folder}, which has 64.0 MiB free, and Ray's session needs 64.0 MiB; free")
    free.free += 1
    check_session_folder()


def test_a_path_that_leaves_no_room_for_sockets_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (long := folder / ("x" * 40)).mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert refused().startswith(f"TMPDIR is {long}, which has more than the 2")


def test_where_no_variable_names_it_one_is_to_be_set(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "none"))
    assert refused().startswith(f"temporary files go to {folder}/none, where") and refused().endswith("another folder")
