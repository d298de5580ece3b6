"""Input files as users have them: what is read, what is refused and how it is said; and what output lines come to."""

from __future__ import annotations

import io
import json

import pytest

from isotherm.cluster.api.batches import rows
from isotherm.cluster.api.batches.rows import Fault, Row, Tally, answered, check, choices, lines, parse_row, unanswered

URL, LONGEST = "/v1/completions", 1000


def row(custom_id="a", **fields):
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"prompt": "x"}, **fields}


def data(*found, end="\n"):
    return (end.join(one if isinstance(one, str) else json.dumps(one) for one in found) + end).encode()


def checked(content):
    count, faults = check(io.BytesIO(content), URL, LONGEST)
    return count, [(fault.code, fault.line) for fault in faults]


@pytest.mark.parametrize(
    "content",
    [
        data(row("a"), row("b")),
        data(row("a"), row("b"), end="\r\n"),
        b"\xef\xbb\xbf" + data(row("a"), row("b")),
        data("", row("a"), "  ", "\t", row("b"), ""),
        data(row("a"), row("b")).rstrip(b"\n"),
    ],
    ids=["plain", "CRLF", "BOM", "blank lines", "no last line end"],
)
def test_what_real_files_hold_is_read(content):
    assert checked(content) == (2, [])
    found = [parse_row(line, URL, LONGEST) for _, line in lines(io.BytesIO(content), LONGEST)]
    assert found == [Row("a", {"prompt": "x"}), Row("b", {"prompt": "x"})]


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ('{"custom_id": "half a li', "invalid_json_line", None),
        ("[]", "invalid_json_line", None),
        ("[" * 900, "invalid_json_line", None),
        ('{"custom_id": "\\ud800"}', "invalid_json_line", None),
        ('{"x": NaN}', "invalid_json_line", None),
        (row(None), "invalid_custom_id", "custom_id"),
        (row(""), "invalid_custom_id", "custom_id"),
        (row(7), "invalid_custom_id", "custom_id"),
        (row(method="GET"), "invalid_method", "method"),
        (row(url="/v1/chat/completions"), "invalid_url", "url"),
        (row(body=[]), "invalid_body", "body"),
        (row(body={"stream": True}), "invalid_body", "body.stream"),
        (row(body={"prompt": "x" * 2000}), "line_too_long", None),
        (row("a"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_a_fault_names_its_line_and_what_is_wrong(line, code, param):
    count, (fault,) = check(io.BytesIO(data(row("a"), "", line, row("c"))), URL, LONGEST)
    assert (fault.code, fault.param, fault.line) == (code, param, 3) and fault.message
    assert fault.as_json() == {"code": code, "message": fault.message, "param": param, "line": 3}
    assert count == 2, "the lines behind a long or damaged one are read as they are"


def test_the_number_of_faults_and_of_rows_is_bounded(monkeypatch):
    assert len(checked(b"{\n" * 5000)[1]) == 100
    assert checked(b"\n \n") == (0, [("empty_file", None)])
    monkeypatch.setattr(rows, "MAX_ROWS", 3)
    assert checked(data(*(row(str(i)) for i in range(3)))) == (3, [])
    assert checked(data(*(row(str(i)) for i in range(9))))[1] == [("too_many_rows", 4)]


def test_a_tally_counts_each_line_and_the_tokens_of_either_kind_of_reply():
    tally = Tally()
    completion = {
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2},
                  "completion_tokens_details": {"reasoning_tokens": 1}}
    }  # fmt: skip
    response = {"usage": {"input_tokens": 7, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}}
    assert tally.add(answered("a", 200, "id", completion)) and tally.add(answered("b", 200, "id", response))
    assert not tally.add(answered("c", 400, "id", {"error": {}})) and not tally.add(unanswered("d", "expired", "late"))
    assert (tally.completed, tally.failed) == (2, 2) and len(tally.done) == 4
    assert tally.usage == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 6},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 17,
    }


def test_a_row_is_a_fault_or_a_row():
    assert isinstance(parse_row(b"{}", URL, LONGEST), Fault)


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({}, 1),
        ({"prompt": "a", "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3], "n": 2}, 2),
        ({"prompt": [[1, 2], [3]], "n": 2, "best_of": 5}, 10),
        ({"messages": [], "n": 4}, 4),
        ({"n": None, "best_of": "7", "prompt": []}, 1),
        ({"n": True, "prompt": {}}, 1),
        ({"n": -5}, 1),
    ],
)
def test_choices_of_a_row(body, count):
    assert choices(body) == count


@pytest.mark.parametrize(("said", "store"), [({}, False), ({"store": None}, False), ({"store": True}, True)])
def test_a_response_is_stored_only_where_its_row_says_so(said, store):
    row = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "x", **said}}
    assert parse_row(json.dumps(row).encode(), "/v1/responses", 1000).body == {"input": "x", "store": store}


def test_other_bodies_are_left_as_they_are():
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    assert parse_row(json.dumps(row).encode(), "/v1/completions", 1000).body == {"prompt": "x"}
