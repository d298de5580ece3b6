"""Where this machine's cluster is remembered: for as long as its process lives, and no longer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isotherm.cluster.on_ray.run_file import SeveralClustersError, local_address, local_url, run_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"isotherm-{os.getuid()}"


@pytest.fixture
def live() -> Iterator[int]:
    """The id of another process that runs."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


URL = "http://127.0.0.1:9123"


def announced(address: str, dashboard: str | None = None, url: str = URL) -> contextlib.AbstractContextManager[None]:
    """Without a warning."""
    return run_file(address, dashboard, url, pytest.fail)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def announce(folder: Path, pid: int | str, address: str, age: float = 0, dashboard: str | None = None) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / f"{pid}.json"
    file.write_text(json.dumps({"address": address, "dashboard": dashboard}))
    when = file.stat().st_mtime - age
    os.utime(file, (when, when))
    return file


def test_a_cluster_is_found_while_it_runs(folder: Path):
    assert local_address() is None
    with announced("127.0.0.1:6379"):
        assert local_address() == "127.0.0.1:6379"
        assert [p.name for p in folder.iterdir()] == [f"{os.getpid()}.json"]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert local_address() is None
    assert not folder.exists()


def test_it_is_forgotten_after_an_error_too(folder: Path):
    with pytest.raises(RuntimeError), announced("127.0.0.1:6379"):
        raise RuntimeError
    assert not folder.exists()


def test_files_of_dead_processes_are_removed(folder: Path, live: int):
    stale = announce(folder, dead_pid(), "127.0.0.1:1")  # newer than the live one's
    kept = announce(folder, live, "127.0.0.1:2", age=100)
    assert local_address() == "127.0.0.1:2"
    assert not stale.exists() and kept.exists()


def test_of_several_clusters_none_is_guessed(folder: Path, live: int):
    """`isotherm stop` would end the one that was not meant, and `isotherm status` would not say which it tells of."""
    announce(folder, live, "127.0.0.1:1", age=100)
    with announced("127.0.0.1:2", "127.0.0.1:8266"):
        with pytest.raises(SeveralClustersError) as error:
            local_address()
        said = str(error.value)
        assert "127.0.0.1:1" in said and "127.0.0.1:2 (dashboard http://127.0.0.1:8266)" in said and "--address" in said
    assert folder.exists()  # the other cluster's
    assert local_address() == "127.0.0.1:1"


def test_a_cluster_that_two_processes_announce_is_one(folder: Path, live: int):
    announce(folder, live, "127.0.0.1:2")
    with announced("127.0.0.1:2"):
        assert local_address() == "127.0.0.1:2"


def test_a_cluster_is_found_by_the_port_of_its_dashboard(folder: Path, live: int):
    announce(folder, live, "127.0.0.1:1", dashboard="127.0.0.1:8265", age=100)
    with announced("127.0.0.1:2", "127.0.0.1:8266"):
        assert [local_address(port) for port in (8265, 8266, 8267, 65)] == ["127.0.0.1:1", "127.0.0.1:2", None, None]


def test_a_front_door_is_found_while_it_is_the_only_one(folder: Path, live: int):
    assert local_url() is None
    with announced("127.0.0.1:2"):
        assert local_url() == URL
        there = announce(folder, live, "127.0.0.1:1")
        assert local_url() == URL  # of before runs said where they listen
        there.write_text(json.dumps({"address": "127.0.0.1:1", "dashboard": None, "url": "http://127.0.0.1:8000"}))
        with pytest.raises(SeveralClustersError) as error:
            local_url()
        said = str(error.value)
        assert URL in said and "http://127.0.0.1:8000" in said and "--url" in said and "--address" not in said
    assert local_url() == "http://127.0.0.1:8000"


def test_a_process_of_another_user_counts_as_alive(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def kill(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", kill)
    announce(folder, 1, "127.0.0.1:1")
    assert local_address() == "127.0.0.1:1"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_broken_file_is_passed_over(folder: Path, live: int, content: str):
    announce(folder, live, "127.0.0.1:1", age=100)
    (folder / f"{os.getpid()}.json").write_text(content)
    (folder / "notes.json").write_text('{"address": "127.0.0.1:9"}')
    assert local_address() == "127.0.0.1:1"


def test_another_users_folder_is_not_believed(folder: Path, live: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    announce(folder, live, "127.0.0.1:1")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert local_address() is None
    folder.unlink()
    other = os.getuid() + 1
    (tmp_path / "elsewhere").rename(tmp_path / f"isotherm-{other}")
    monkeypatch.setattr("os.getuid", lambda: other)
    assert local_address() is None


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o700])
def test_a_link_of_another_user_writes_over_no_file(folder: Path, tmp_path: Path, mode: int):
    """Whoever may write to the folder for temporary files knows the name of this user's, and can make it first."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("mine")
    folder.mkdir()
    folder.chmod(mode)
    (folder / f"{os.getpid()}.new").symlink_to(victim)
    said: list[str] = []
    with run_file("127.0.0.1:1", None, URL, said.append):
        assert local_address() == ("127.0.0.1:1" if mode == 0o700 else None)
    assert victim.read_text() == "mine"
    told = ["--address 127.0.0.1:1", f"--url {URL}", str(folder)]
    assert (said == []) if mode == 0o700 else [word for word in told if word not in said[0]] == []


def test_what_cannot_be_announced_serves_all_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with run_file("127.0.0.1:1", None, URL, said.append):
        assert not list((tmp_path / "elsewhere").iterdir())
    folder.unlink()
    other = os.getuid() + 1
    (tmp_path / f"isotherm-{other}").mkdir(mode=0o700)
    monkeypatch.setattr("os.getuid", lambda: other)
    with run_file("127.0.0.1:1", None, URL, said.append):
        assert not list((tmp_path / f"isotherm-{other}").iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with run_file("127.0.0.1:1", None, URL, said.append):
        pass
    assert len(said) == 3 and all("isotherm status" in words for words in said)
