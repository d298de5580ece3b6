"""Files and batches on disk: bounded, swept, shared by several stores, and whole after a death."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from isotherm.cluster.api.batches.state import moved, new_batch
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.errors import ReplyError

KEEP = 1000


@pytest.fixture
def store(tmp_path, clock):
    return Store(tmp_path, 10_000, KEEP, clock)


def put(store, content=b"x" * 100, name="in.jsonl", **rest):
    path = store.new_upload()
    path.write_bytes(content)
    return store.add_file(path, name, "batch", **rest)


def batch_of(store, file_id, number=1):
    batch = new_batch(f"batch_{number:032x}", "/v1/completions", file_id, "1h", None, None, store.clock())
    store.add_batch(batch)
    return batch


def missing(call, *args):
    with pytest.raises(ReplyError) as info:
        call(*args)
    return info.value.status


def test_a_file_comes_back_as_it_went_in(store, tmp_path):
    file = put(store, b"abc")
    assert (file["bytes"], file["purpose"], file["expires_at"]) == (3, "batch", 5000 + KEEP)
    assert store.file(file["id"]) == file and store.content(file["id"]).read_bytes() == b"abc"
    assert Store(tmp_path, 1, KEEP, store.clock).files() == [file], "another replica sees it"
    store.delete_file(file["id"])
    assert missing(store.file, file["id"]) == 404 and store.files() == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("given", ["", "..", "file-1", "../batches", f"file-{'0' * 32}", f"file-{'0' * 31}/", "\0"])
def test_what_is_no_id_names_nothing(store, given):
    assert missing(store.file, given) == 404 and missing(store.content, given) == 404
    assert missing(store.delete_file, given) == 404
    assert missing(store.batch, given.replace("file-", "batch_")) == 404


def test_what_has_expired_goes_and_what_is_in_use_stays(store, clock):
    old, kept, used = put(store), put(store, keep=9000), put(store)
    running, ended = batch_of(store, used["id"], 1), batch_of(store, old["id"], 2)
    store.save(moved(ended, "completed", clock()))
    left = store.new_upload()
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    store.sweep()
    assert len(store.files()) == 3 and not left.exists()
    clock.now += KEEP + 1
    assert missing(store.file, old["id"]) == 404, "before it is swept too"
    store.sweep()
    assert {file["id"] for file in store.files()} == {kept["id"], used["id"]}
    assert [batch["id"] for batch in store.batches()] == [running["id"]]
    assert store.input(running).exists()


def test_a_batch_and_its_output_are_kept_from_its_end(store, clock):
    """Else one that took longer than they are kept would be gone as soon as it is done."""
    batch = batch_of(store, put(store)["id"])
    clock.now += 5 * KEEP
    with store.lines_of(batch["id"], "output.jsonl", print) as file:
        file.write(b"{}\n")
    output = store.publish(batch, "output.jsonl", "file-" + "a" * 32)
    store.save(moved(batch, "completed", clock()))
    clock.now += KEEP - 1
    store.sweep()
    assert store.batch(batch["id"])["status"] == "completed" and store.file(output)["purpose"] == "batch_output"
    clock.now += 2
    store.sweep()
    assert store.batches() == store.files() == []


@pytest.mark.parametrize("torn", [b"", b"\0" * 300, b'{"id": "batch_', b"[]"])
def test_what_a_power_cut_has_torn_is_left_out_and_the_others_are_there(store, tmp_path, clock, caplog, torn):
    files, batches = [put(store), put(store)], []
    for number, file in enumerate(files):
        batches.append(batch_of(store, file["id"], number))
    (tmp_path / "batches" / batches[0]["id"] / "batch.json").write_bytes(torn)
    (tmp_path / "files" / f"{files[0]['id']}.json").write_bytes(torn)
    (tmp_path / "batches" / "README").write_text("who put this here?")
    for _ in range(3):
        assert [batch["id"] for batch in store.unfinished()] == [batches[1]["id"]]
        assert [batch["id"] for batch in store.batches()] == [batches[1]["id"]]
        assert [file["id"] for file in store.files()] == [files[1]["id"]]
        assert missing(store.batch, batches[0]["id"]) == missing(store.file, files[0]["id"]) == 404
    assert len(caplog.messages) == 2, "each is told once"
    store.sweep()
    assert (tmp_path / "files" / files[0]["id"]).exists(), "whoever runs the server may still look at it"
    clock.now = time.time() + KEEP + 60
    store.sweep()
    assert {path.name for path in (tmp_path / "batches").iterdir()} == {batches[1]["id"], "README"}
    assert {path.name for path in (tmp_path / "files").iterdir()} == {files[1]["id"], f"{files[1]['id']}.json"}


def test_what_cannot_be_written_leaves_nothing(store, tmp_path, clock, monkeypatch):
    batch = batch_of(store, put(store)["id"])
    before = sorted(tmp_path.rglob("*"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("isotherm.cluster.api.batches.stored.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(moved(batch, "in_progress", clock()))
    with pytest.raises(OSError, match="No space"):
        store.add_batch({**batch, "id": f"batch_{7:032x}"})
    monkeypatch.undo()
    monkeypatch.setattr("isotherm.cluster.api.batches.stored.write", full)  # the content is there already
    with pytest.raises(OSError, match="No space"):
        put(store)
    assert sorted(tmp_path.rglob("*")) == before and store.batch(batch["id"])["status"] == "validating"


def test_of_a_batch_that_waits_its_client_is_told_why(store, clock, monkeypatch):
    one, other = batch_of(store, put(store)["id"]), batch_of(store, put(store)["id"], 2)
    store.waits(one["id"], OSError(errno.EDQUOT, "Disk quota exceeded"))
    store.waits(other["id"], OSError(errno.ESTALE, "Stale file handle"))

    def said(batch):
        assert store.batch(batch["id"]) in store.batches()
        errors = store.batch(batch["id"])["errors"]
        return errors and [(fault["code"], fault["message"]) for fault in errors["data"]]

    ((full, words),), ((away, reason),) = said(one), said(other)
    assert full == "storage_full" and "disk is full; the batch waits" in words
    assert away == "storage_unavailable" and "Stale file handle" in reason
    assert store.stored(one["id"])["errors"] is None, "it is not stored"
    store.save(moved(one, "in_progress", clock()))
    assert said(one) is None and said(other)
    store.save(moved(other, "failed", clock()))
    store.waits(other["id"], OSError(errno.ENOSPC, "No space left on device"))
    assert said(other) is None, "it waits for nothing"
    # Another replica runs it, and this one sees the disk alone.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    assert said(one) == [(full, words)] and said(other) is None


def test_what_is_written_is_on_the_disk_before_it_has_its_name(store, monkeypatch):
    done = []
    monkeypatch.setattr("isotherm.cluster.api.batches.stored.os.fsync", lambda file: done.append("sync"))
    monkeypatch.setattr("isotherm.cluster.api.batches.stored.os.replace", lambda *paths: done.append("name"))
    store.save({"id": batch_of(store, "file-1")["id"]})
    assert done[:3] == ["sync", "name", "sync"]


def test_a_file_that_a_batch_reads_is_not_deleted(store, clock):
    file = put(store)
    batch = batch_of(store, file["id"])
    with pytest.raises(ReplyError) as info:
        store.delete_file(file["id"])
    assert info.value.status == 409 and info.value.headers["x-should-retry"] == "false"
    store.save(moved(batch, "failed", clock()))
    store.delete_file(file["id"])


def test_those_that_go_on_come_in_their_order_and_the_others_are_not_read_again(store, clock, monkeypatch):
    batches = []
    for number in range(1, 5):
        clock.now += 1
        batches.append(batch_of(store, put(store)["id"], number))
    store.save(moved(batches[1], "expired", clock()))
    assert [batch["id"] for batch in store.unfinished()] == [batches[i]["id"] for i in (0, 2, 3)]
    monkeypatch.setattr("isotherm.cluster.api.batches.stored.read", lambda path: pytest.fail(str(path)))
    for batch in batches:
        store._ended.add(batch["id"])
    assert store.unfinished() == []


def test_cancelling_is_a_mark_that_all_see(store, tmp_path):
    batch = batch_of(store, put(store)["id"])
    other = Store(tmp_path, 1, KEEP, store.clock)
    assert other.batch(batch["id"])["status"] == "validating"
    store.cancel(batch["id"])
    assert other.batch(batch["id"])["status"] == "cancelling" and other.stored(batch["id"])["status"] == "validating"


HOLD = """
import sys, pathlib, time
from isotherm.cluster.api.batches.store import Store
with Store(pathlib.Path(sys.argv[1]), 1, 1000).lock(sys.argv[2]) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_one_at_a_time_holds_a_batch_and_a_death_lets_it_go(store, tmp_path):
    batch = batch_of(store, put(store)["id"])
    with store.lock(batch["id"]) as mine, Store(tmp_path, 1, KEEP).lock(batch["id"]) as other:
        assert (mine, other) == (True, False)
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, batch["id"]], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"True\n"
        with store.lock(batch["id"]) as mine:
            assert not mine
        process.kill()
    with store.lock(batch["id"]) as mine:
        assert mine
    with store.lock("batch_" + "9" * 32) as none:
        assert not none


def test_a_torn_last_line_is_cut_off(store, tmp_path):
    batch = batch_of(store, put(store)["id"])
    with store.lines_of(batch["id"], "output.jsonl", print) as file:
        file.write(b'{"a": 1}\n{"b": 2}\n{"c": ')
    seen: list = []
    with store.lines_of(batch["id"], "output.jsonl", seen.append) as file:
        file.write(b'{"c": 3}\n')
    assert seen == [{"a": 1}, {"b": 2}]
    path = tmp_path / "batches" / batch["id"] / "output.jsonl"
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_an_unreadable_line_is_cut_out(store, tmp_path):
    """Its row is asked again; whoever reads the output can read all of it."""
    batch = batch_of(store, put(store)["id"])
    with store.lines_of(batch["id"], "output.jsonl", print) as file:
        file.write(b'{"a": 1}\n\0\0\0\n{"b": 2}\n{"c"\n{"d": 4}\n{"e"')
    seen: list = []
    with store.lines_of(batch["id"], "output.jsonl", seen.append) as file:
        file.write(b'{"c": 3}\n')
    assert seen == [{"a": 1}, {"b": 2}, {"d": 4}]
    path = tmp_path / "batches" / batch["id"] / "output.jsonl"
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [*seen, {"c": 3}]
    assert not list(path.parent.glob(".*"))


def test_output_is_published_once_however_often_it_is_tried(store):
    batch = batch_of(store, put(store)["id"])
    wanted = "file-" + "a" * 32
    with store.lines_of(batch["id"], "output.jsonl", print) as file:
        assert store.publish(batch, "errors.jsonl", "file-" + "b" * 32) is None
        file.write(b"{}\n")
    assert [store.publish(batch, "output.jsonl", wanted) for _ in range(2)] == [wanted, wanted]
    assert store.content(wanted).read_bytes() == b"{}\n" and store.file(wanted)["purpose"] == "batch_output"
    empty = batch_of(store, put(store)["id"], 2)
    store.lines_of(empty["id"], "output.jsonl", print).close()
    assert store.publish(empty, "output.jsonl", "file-" + "c" * 32) is None
