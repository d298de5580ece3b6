"""The line of a request that has ended."""

from __future__ import annotations

import json
import logging

import pytest
from request_records import record

from isotherm.cluster.api.trace_context import TraceContext
from isotherm.cluster.logs import FIELDS, JsonLines, TextLines
from isotherm.cluster.observe.request_log import log_request


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({}, logging.INFO),
        ({"status": 429, "error": "overloaded"}, logging.INFO),
        ({"status": 499, "error": "client_closed"}, logging.INFO),
        ({"status": 503, "error": "unavailable"}, logging.WARNING),
        ({"error": "generation_failed"}, logging.WARNING),
    ],
)
def test_our_faults_are_warnings(caplog, fields, level):
    with caplog.at_level(logging.INFO, "isotherm.request"):
        log_request(record(**fields))
    assert [r.levelno for r in caplog.records] == [level]


def test_the_line_has_id_key_and_times(caplog):
    with caplog.at_level(logging.INFO, "isotherm.request"):
        log_request(record(trace=TraceContext("ab" * 16, "cd" * 8)))
    (line,) = caplog.records
    fields = getattr(line, FIELDS)
    assert (fields["request"], fields["key"]) == ("req-1", "alice")
    assert (fields["queue_ms"], fields["first_token_ms"]) == (200, 510)
    assert fields["trace"] == "ab" * 16
    words = TextLines("ingress").format(line)
    assert " INFO: ended request=req-1 " in words and "key=alice" in words and "stream=yes" in words
    assert "error_type" not in words
    said = json.loads(JsonLines("ingress").format(line))
    assert said["message"] == "ended" and said.items() >= fields.items(), "each figure stands there once"


def test_nothing_is_made_of_it_where_nobody_listens(caplog):
    with caplog.at_level(logging.ERROR, "isotherm.request"):
        log_request(record())
    assert not caplog.records
