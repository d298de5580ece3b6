from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from isotherm.cluster.api.access.caller import Caller, KeyLimits
from isotherm.cluster.api.access.hashing import hashed
from isotherm.cluster.api.access.keys_file import (
    KeyEntry,
    KeysFileError,
    changing,
    find,
    parse_keys,
    read_keys,
    write_keys,
)  # fmt: skip

HASH = hashed("a key")


def entry(name: str, key_id: str = "", **fields: Any) -> KeyEntry:
    return KeyEntry(id=key_id or f"{name:0>8}"[:8], name=name, hash=HASH, **fields)


def said(**fields: Any) -> bytes:
    return json.dumps({"keys": [{"id": "aaaaaaaa", "name": "a", "hash": HASH, **fields}]}).encode()


def test_what_is_written_is_read(tmp_path: Path):
    entries = (
        entry("a"),
        entry("b", roles=["admin", "use"], tokens_per_minute=5, models=["m"], weight=2.5, tenant="t"),
    )
    write_keys(tmp_path / "k.json", entries)
    assert read_keys(tmp_path / "k.json") == entries
    assert os.stat(tmp_path / "k.json").st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["k.json"]
    assert '"weight"' in (tmp_path / "k.json").read_text() and '"priority"' not in (tmp_path / "k.json").read_text()


def test_whoever_could_read_the_file_still_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server of another user, which would otherwise never learn that a key is revoked."""
    path, given = tmp_path / "k.json", []
    write_keys(path, (entry("a"),))
    path.chmod(0o640)
    if os.getuid() == 0:
        os.chown(path, 1234, 2345)
    owner = os.stat(path).st_uid, os.stat(path).st_gid
    write_keys(path, ())
    now = os.stat(path)
    assert (now.st_uid, now.st_gid, now.st_mode & 0o777) == (*owner, 0o640) and read_keys(path) == ()

    def refuse(*ids: int) -> None:
        given.append(ids)
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    write_keys(path, (entry("a"),))
    assert given and os.stat(path).st_mode & 0o777 == 0o600, "of a group that is another one nobody may read it"


def test_a_link_stays_one_and_the_file_behind_it_is_written(tmp_path: Path):
    """A server that was given the file itself went on with its keys, revoked ones too."""
    (folder := tmp_path / "real").mkdir()
    target, link = folder / "k.json", tmp_path / "k.json"
    write_keys(target, (entry("a"),))
    link.symlink_to("real/k.json")
    with changing(link):
        write_keys(link, ())
    assert link.is_symlink() and read_keys(target) == () and [p.name for p in folder.iterdir()] == ["k.json"]


def test_whoever_changes_a_file_by_a_link_waits_for_who_changes_the_file(tmp_path: Path):
    (folder := tmp_path / "real").mkdir()
    (link := tmp_path / "k.json").symlink_to("real/k.json")
    inside = threading.Event()

    def change() -> None:
        with changing(link):
            inside.set()

    thread = threading.Thread(target=change)
    with changing(folder / "k.json"):
        thread.start()
        assert not inside.wait(0.1)
    thread.join()
    assert inside.is_set()


def test_a_keys_caller():
    assert entry("a").caller() == Caller("a", frozenset({"use"}), "a")
    many = entry("b", roles=["admin"], streams=2, n=1, models=["m"], tenant="t", priority=-3, weight=3.0)
    limits = KeyLimits(streams=2, n=1, models=frozenset({"m"}))
    assert many.caller() == Caller("b", frozenset({"admin", "observe"}), "t", 3.0, -3, limits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "must be an object"),
        (b"{}", "keys: Field required"),
        (said(secret="x"), r"keys\[0\].secret: Extra inputs are not permitted"),
        (said(id="UPPER123"), r"keys\[0\].id"),
        (said(name="two words"), r"keys\[0\].name"),
        (said(hash="iso-aaaaaaaa-plain"), r"keys\[0\].hash: must be scrypt:"),
        (said(roles=[]), r"keys\[0\].roles"),
        (said(roles=["root"]), r"keys\[0\].roles\[0\]: must be 'use', 'observe' or 'admin'"),
        (said(streams=0), r"keys\[0\].streams: must be greater than or equal to 1"),
        (said(weight=0), r"keys\[0\].weight"),
        (said(n="4"), r"keys\[0\].n: must be a valid integer"),
    ],
)
def test_mistakes_are_named(text: bytes, words: str):
    with pytest.raises(KeysFileError, match=f"^k.json: .*{words}"):
        parse_keys(text, "k.json")


def test_an_error_never_shows_what_stands_in_the_file():
    with pytest.raises(KeysFileError) as error:
        parse_keys(said(hash="iso-aaaaaaaa-mysecret"), "k.json")
    assert "mysecret" not in str(error.value)


def test_ids_and_names_are_a_keys_own(tmp_path: Path):
    for pair in ((entry("a", "aaaaaaaa"), entry("b", "aaaaaaaa")), (entry("a", "aaaaaaaa"), entry("a", "bbbbbbbb"))):
        write_keys(tmp_path / "k.json", pair)
        with pytest.raises(KeysFileError, match="which another key has"):
            read_keys(tmp_path / "k.json")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(KeysFileError, match="cannot be read"):
        read_keys(tmp_path / "k.json")


def test_found_by_name_or_id():
    entries = [entry("a", "11111111"), entry("11111111", "22222222")]
    assert find(entries, "a") is entries[0] and find(entries, "22222222") is entries[1]
    assert find(entries, "11111111") is entries[1] and find(entries, "c") is None


def test_of_many_who_add_a_key_at_once_all_have_added_theirs(tmp_path: Path):
    path = tmp_path / "k.json"
    write_keys(path, [])

    def add(name: str) -> None:
        with changing(path):
            write_keys(path, [*read_keys(path), entry(name)])

    threads = [threading.Thread(target=add, args=(f"k{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.name for one in read_keys(path)} == {f"k{i}" for i in range(12)}
