"""Results: their form, what is found again, and how they are read."""

from __future__ import annotations

import json

import pytest

from isotherm.cluster.client import APIError, BatchError, RateLimitError, read_results
from isotherm.cluster.client.answers import RawResponse
from isotherm.cluster.client.batch_output import OutputFile, failed, result_line
from isotherm.cluster.client.batch_rows import Row


def row(name="a", occurrence=1):
    return Row(name, occurrence, "/v1/completions", {})


def answer(http=200, **body):
    return RawResponse(http, "r", body or {"choices": [{"text": "hi"}]})


def test_results_are_found_again(tmp_path):
    rows = [row(), row("a", 2), row("\ud800é"), row("c")]
    with OutputFile(tmp_path / "out") as output:
        assert output.done == {}
        output.write(result_line(rows[0], answer(), None))
        output.write(result_line(rows[1], answer(400, error={"message": "no"}), None))
        output.write(result_line(rows[2], None, {"code": "invalid_row", "message": "no"}))
    with OutputFile(tmp_path / "out") as output:
        assert output.done == {rows[0].key: False, rows[1].key: True, rows[2].key: True}
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line.get("occurrence") for line in lines] == [None, 2, None] and lines[2]["custom_id"] == "\ud800é"


def test_a_line_has_no_other_line_ends_in_it(tmp_path):
    said = "a\u2028b\u2029c\x85d"
    with OutputFile(tmp_path / "out") as output:
        output.write(result_line(row(), answer(choices=[{"text": said}]), None))
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(line)["response"]["body"]["choices"][0]["text"] == said


def test_what_has_failed():
    assert not failed(result_line(row(), answer(), None))
    assert not failed(result_line(row(), answer(output=[], status="completed"), None))
    assert failed(result_line(row(), answer(output=[], status="failed"), None))
    assert failed(result_line(row(), answer(404), None))
    assert failed(result_line(row(), None, {"code": "invalid_row", "message": "no"}))


def test_results_are_read(tmp_path):
    with OutputFile(tmp_path / "out") as output:
        output.write(result_line(row("a"), answer(), None))
        output.write(result_line(row("b"), answer(429, error={"message": "busy"}), None))
        output.write(result_line(row("c"), None, {"code": "invalid_row", "message": "method: no"}))
    one, two, three = read_results(tmp_path / "out")
    assert (one.custom_id, one.status, one.text, one.error) == ("a", 200, "hi", "")
    assert (two.error, three.error) == ("busy", "method: no")
    with pytest.raises(RateLimitError, match="busy"):
        print(two.completion)
    with pytest.raises(APIError, match="method: no"):
        print(three.text)
    (tmp_path / "other").write_text("{}\n")
    with pytest.raises(BatchError, match="line 1 is not"):
        list(read_results(tmp_path / "other"))


def test_compressed_results_are_refused_in_words(tmp_path):
    with pytest.raises(BatchError, match="without .gz"):
        OutputFile(tmp_path / "out.jsonl.gz")
    assert not list(tmp_path.iterdir())
