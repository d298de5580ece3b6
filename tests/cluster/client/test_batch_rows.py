"""What records mean, without files or servers."""

from __future__ import annotations

import pytest

from isotherm.cluster.client import BatchError
from isotherm.cluster.client.batch_input import Kind, Record
from isotherm.cluster.client.batch_rows import Rows


def take(*values):
    """The rows of these values, and who made them."""
    rows = Rows()
    return [rows.take(Record(f"in:{i}", Kind.ROW, value)) for i, value in enumerate(values, 1)], rows


def one(value):
    return take(value)[0][0]


@pytest.mark.parametrize(
    ("value", "url", "body"),
    [
        ({"url": "/v1/completions", "method": "POST", "body": {"prompt": "a"}}, "/v1/completions", {"prompt": "a"}),
        ({"url": "/v1/responses", "body": {"input": "a"}}, "/v1/responses", {"input": "a"}),
        ({"body": {"messages": []}}, "/v1/chat/completions", {"messages": []}),
        ({"body": '{"messages": []}'}, "/v1/chat/completions", {"messages": []}),
        ({"prompt": "a", "n": 2}, "/v1/completions", {"prompt": "a", "n": 2}),
        ({"messages": [], "model": "m"}, "/v1/chat/completions", {"messages": [], "model": "m"}),
        ({"input": "a"}, "/v1/responses", {"input": "a"}),
    ],
)
def test_requests(value, url, body):
    row = one({"custom_id": "x", **value})
    assert (row.custom_id, row.url, row.body, row.problem) == ("x", url, body, "")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "expected a JSON object, got list"),
        ({"custom_id": "x"}, "row: expected one of messages, prompt, input (or custom_id, url and body), got none"),
        ({"prompt": "a", "messages": []}, "got messages and prompt"),
        ({"body": {"text": "a"}}, "url: expected one of messages"),
        ({"url": "/v1/embeddings", "body": {}}, "url: expected /v1/chat/completions, "),
        ({"method": "GET", "prompt": "a"}, "method: expected 'POST', got 'GET'"),
        ({"url": "/v1/completions", "body": []}, "body: expected an object, got list"),
        ({"url": "/v1/completions"}, "body: expected an object, got NoneType"),
        ({"body": "{"}, "body: not JSON"),
        ({"prompt": "a", "stream": True}, "body.stream: "),
        ({"input": "a", "background": True}, "body.background: "),
        ({"prompt": float("nan")}, "body: can't be sent as JSON"),
        ({"prompt": "\ud800"}, "body: can't be sent as JSON"),
        ({"prompt": b"bytes of a table"}, "body: can't be sent as JSON"),
        ({"custom_id": [1], "prompt": "a"}, "custom_id: expected a string, got list"),
        ({"custom_id": True, "prompt": "a"}, "custom_id: expected a string"),
    ],
)
def test_what_is_no_request_says_why(value, problem):
    assert problem in one(value).problem


def test_names():
    (given, number, none, empty), rows = take(
        {"custom_id": "a", "prompt": ""},
        {"custom_id": 7, "prompt": ""},
        {"custom_id": None, "prompt": ""},
        {"custom_id": "", "prompt": ""},
    )
    assert [row.custom_id for row in (given, number, none, empty)] == ["a", "7", "in:3", "in:4"]
    assert [words.split(":")[0] for words in rows.notes()] == [
        "2 without a custom_id",
        "1 with a number for a custom_id",
    ]


def test_a_name_that_is_given_again():
    first = {"custom_id": "a", "body": {"prompt": "x", "n": 1}}
    same = {"body": {"n": 1, "prompt": "x"}, "custom_id": "a"}
    found, rows = take(first, same, {"custom_id": "a", "prompt": "y"}, first, {"custom_id": "b", "prompt": "x"})
    assert [row and (row.custom_id, row.occurrence) for row in found] == [("a", 1), None, ("a", 2), None, ("b", 1)]
    keys = [row.key for row in found if row is not None]
    assert len(set(keys)) == 3 and [len(key) for key in keys] == [16] * 3
    assert [words[:3] for words in rows.notes()] == ["2 r", "1 w"]


def test_rows_without_a_model():
    assert not take({"prompt": "a", "model": "m"}, {"prompt": "a", "n": float("inf")})[1].without_model
    assert take({"prompt": "a", "model": ""})[1].without_model


def test_a_file_without_a_row_is_of_another_kind():
    rows = Rows()
    rows.take(Record("in:1", Kind.UNREADABLE, problem="not JSON: no"))
    with pytest.raises(BatchError, match="in:1: not JSON: no; expected JSON Lines"):
        rows.check()
    rows.take(Record("in:2", Kind.ROW, {"prompt": "a"}))
    rows.check()
    Rows().check()
