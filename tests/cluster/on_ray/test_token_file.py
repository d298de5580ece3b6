"""Ray's token is made where there is none, and no other user can read it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isotherm.cluster.on_ray import token_file
from isotherm.cluster.on_ray.token_file import ELSEWHERE, RayTokenError, keep_token


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    old = os.umask(0o022)
    yield tmp_path / "home"
    os.umask(old)


def access(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_that_its_owner_alone_can_read(home: Path):
    keep_token()
    file = home / ".ray" / "auth_token"
    assert len(bytes.fromhex(file.read_text())) == 32 and access(file) == 0o600 and access(file.parent) == 0o700
    made = file.read_text()
    keep_token()
    assert file.read_text() == made and [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_one_that_ray_has_made_for_everybody_to_read_is_kept_from_them(home: Path):
    (home / ".ray").mkdir(parents=True)
    (file := home / ".ray" / "auth_token").write_text("there already")
    assert access(file) == 0o644
    keep_token()
    assert access(file) == 0o600 and file.read_text() == "there already"


def test_of_several_at_once_all_find_the_first_ones(home: Path):
    file = home / ".ray" / "auth_token"

    def seen(_: int) -> str:
        keep_token()
        return file.read_text()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(seen, range(32)))) == 1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_token_from_elsewhere_needs_no_file(home: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "x")
    keep_token()
    assert not home.exists()


def test_without_a_place_for_it_the_error_says_what_to_set(home: Path, monkeypatch: pytest.MonkeyPatch):
    home.write_text("no folder")
    with pytest.raises(RayTokenError) as caught:
        keep_token()
    said = str(caught.value)
    assert str(home) in said and "(Not a directory)" in said and "RAY_AUTH_TOKEN_PATH" in said

    def not_permitted(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    home.unlink()
    monkeypatch.setattr(token_file, "_make", not_permitted)
    with pytest.raises(RayTokenError, match="Permission denied"):
        keep_token()
