"""Whether the folder for files and batches can be used, without anything that stays in it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from isotherm.cluster.api.batches.store import FOLDERS
from isotherm.cluster.doctor import batches
from isotherm.cluster.doctor.batches import BatchFacts, judge_batches, look_at_batches
from isotherm.cluster.doctor.finding import Finding
from isotherm.cluster.manifest import HttpSection, parse_manifest

GOOD = BatchFacts("/var/batches", "", 2 << 30, 1 << 30)


def http(folder: Path) -> HttpSection:
    return parse_manifest({"http": {"batches": {"folder": str(folder)}}}).http


def found(folder: Path) -> Finding:
    (finding,) = judge_batches(look_at_batches(http(folder), FOLDERS))
    return finding


def test_a_folder_of_the_session_is_looked_at_elsewhere():
    assert look_at_batches(parse_manifest({}).http, FOLDERS) is None and judge_batches(None) == []


def test_a_folder_that_is_there_or_can_be_made_is_well_and_nothing_is_left(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        finding = found(folder)
        assert finding.state.value in ("ok", "warn") and f"{folder}, " in finding.words and " free" in finding.words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/files", "/uploads"])
def test_where_a_file_is_no_folder_can_be(tmp_path: Path, below: str):
    (tmp_path / "kept").mkdir()
    path = tmp_path / f"kept{below}"
    if not below:
        path.rmdir()
    path.touch()
    finding = found(tmp_path / "kept")
    assert finding.state.value == "fail" and "Not a directory" in finding.words and "name a folder" in finding.advice


def test_a_link_to_nowhere_is_no_folder(tmp_path: Path):
    (tmp_path / "kept").symlink_to(tmp_path / "away")
    assert found(tmp_path / "kept").state.value == "fail"


def test_one_that_this_user_may_not_write(tmp_path: Path):
    (tmp_path / "kept").mkdir(mode=0o500)
    # Root may write anywhere but where the system itself makes the files.
    assert found(Path("/proc/self") if os.getuid() == 0 else tmp_path / "kept").state.value == "fail"


def test_one_on_a_disk_that_takes_nothing_more(tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batches.tempfile, "TemporaryFile", full)
    finding = found(tmp_path)
    assert finding.state.value == "fail" and "No space left on device" in finding.words


def test_little_room_is_said():
    (finding,) = judge_batches(GOOD)
    assert finding.state.value == "ok"
    (finding,) = judge_batches(replace(GOOD, free=1 << 20))
    assert finding.state.value == "warn" and "1.0 MiB free" in finding.words and "1.0 GiB" in finding.advice
