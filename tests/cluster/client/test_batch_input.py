"""Files of every form as records."""

from __future__ import annotations

import builtins
import gzip
import json

import pytest

from isotherm.cluster.client import BatchError, batch_input
from isotherm.cluster.client.batch_input import Kind, MemorySource, check_there, opened


def records(path, output=None):
    with opened(path, output or path.__class__("no-such-output")) as source:
        found = list(source.records())
        assert list(source.records()) == found  # as often as asked
        return found


def values(path):
    return [record.value for record in records(path)]


def test_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n"\xc3\xa9"\noops\n\xff\n' + b"[" * 100_000 + b"\n[1]")
    found = records(path)
    assert [record.kind for record in found] == [
        Kind.ROW,
        Kind.BLANK,
        Kind.BLANK,
        Kind.ROW,
        Kind.UNREADABLE,
        Kind.UNREADABLE,
        Kind.UNREADABLE,
        Kind.ROW,
    ]
    assert (found[0].value, found[3].value, found[7].value) == ({"a": 1}, "é", [1])
    assert found[4].place == "in.jsonl:5" and found[4].problem.startswith("not JSON")


@pytest.mark.parametrize("end", [b'{"a": ', b"\x00\x00\x00", b'{"a": "\xc3'])
def test_an_end_that_is_not_there_yet(tmp_path, end):
    path = tmp_path / "in"
    path.write_bytes(b"[1]\n" + end)
    assert [record.kind for record in records(path)] == [Kind.ROW, Kind.TORN]


def test_a_line_that_is_too_long_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_input, "MAX_LINE_BYTES", 100)
    path = tmp_path / "in"
    path.write_bytes(b'"' + b"x" * 1000 + b'"\n[1]\n' + b'"' + b"y" * 98 + b'"\n"' + b"z" * 500)
    found = records(path)
    assert [record.kind for record in found] == [Kind.UNREADABLE, Kind.ROW, Kind.UNREADABLE, Kind.UNREADABLE]
    assert found[1].place == "in:2" and "more than" in found[0].problem


def test_gzip_is_known_by_its_content(tmp_path):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b"[1]\n[2]\n"))
    (tmp_path / "in.jsonl").write_bytes(gzip.compress(b"[1]\n[2]\n"))
    assert values(tmp_path / "in.jsonl.gz") == values(tmp_path / "in.jsonl") == [[1], [2]]


def test_gzip_that_breaks_off(tmp_path):
    data = gzip.compress(b"".join(json.dumps([i, "x" * (i % 97)]).encode() + b"\n" for i in range(5000)), 1)
    (tmp_path / "in").write_bytes(data[: len(data) // 2])
    found = records(tmp_path / "in")
    assert found[-1].kind is Kind.TORN and "gzip" in found[-1].problem
    assert [record.value[0] for record in found[:-1]] == list(range(len(found) - 1))
    (tmp_path / "in").write_bytes(data[:1000] + b"\x00" * 1000 + data[2000:])
    assert records(tmp_path / "in")[-1].kind is Kind.TORN


def test_utf_16_is_refused_in_words(tmp_path):
    (tmp_path / "in").write_text("[1]\n", encoding="utf-16")
    with pytest.raises(BatchError, match="in: is UTF-16"):
        records(tmp_path / "in")


def test_globs_are_sorted_and_leave_the_output_out(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "out.jsonl"):
        (tmp_path / name).write_text(f'"{name}"\n')
    (tmp_path / "c.jsonl").mkdir()
    out = tmp_path / "out.jsonl"
    assert [record.value for record in records(tmp_path / "*.jsonl", out)] == ["a.jsonl", "b.jsonl"]
    with opened([str(tmp_path / "a*"), tmp_path / "b.jsonl", str(tmp_path / "*.jsonl")], out) as source:
        assert [record.value for record in source.records()] == ["a.jsonl", "b.jsonl"]  # each once
    with pytest.raises(BatchError, match="matches no file"):
        records(tmp_path / "z*", out)
    with pytest.raises(BatchError, match="is the output too"):
        records(out, out)


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "in").write_text("1\n")
    (tmp_path / "other").write_text("1\n")
    with opened([tmp_path / "a" / "in", tmp_path / "b" / "in", tmp_path / "other"], tmp_path / "out") as source:
        places = [record.place for record in source.records()]
    assert places == [f"{tmp_path}/a/in:1", f"{tmp_path}/b/in:1", "other:1"]


def test_what_is_not_there_is_said_without_reading(tmp_path):
    (tmp_path / "in").write_text("oops")
    check_there([tmp_path / "in", "-"], tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        check_there([tmp_path / "none"], tmp_path / "out")


def test_memory():
    assert [record.value for record in MemorySource(iter(["hi", {"prompt": "x"}])).records()] == [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "x"},
    ]


def test_parquet_gives_what_its_columns_say(tmp_path):
    from pyarrow import Table, parquet

    rows = [
        {"custom_id": "a", "messages": [{"role": "user", "content": "é", "name": None}], "max_tokens": 3},
        {"custom_id": None, "messages": [{"role": "user", "content": "b", "name": "n"}], "max_tokens": None},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "in.parquet")
    found = records(tmp_path / "in.parquet")
    assert [record.value for record in found] == [
        {"custom_id": "a", "messages": [{"role": "user", "content": "é"}], "max_tokens": 3},
        {"messages": [{"role": "user", "content": "b", "name": "n"}]},
    ]
    assert [record.place for record in found] == ["in.parquet:1", "in.parquet:2"]


def test_parquet_that_is_broken(tmp_path):
    (tmp_path / "in").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(BatchError, match="in: cannot be read as Parquet"):
        records(tmp_path / "in")


def test_parquet_without_pyarrow_is_refused_in_words(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "in").write_bytes(b"PAR1")
    with pytest.raises(BatchError, match="needs pyarrow; install it with"):
        records(tmp_path / "in")
