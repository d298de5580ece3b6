"""The lines that processes of ours write."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from isotherm.cluster.logs import FIELDS, JsonLines, set_up_logs

NAME = "isotherm-test-logs"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger(NAME)
    yield found
    found.handlers, found.propagate = [], True
    found.setLevel(logging.NOTSET)


def test_a_json_line_has_the_event_and_its_own_fields(logger, capsys):
    set_up_logs("attention-0", "json", "info", NAME)
    logger.info("step %d", 3, extra={FIELDS: {"request": "abc", "seconds": 0.5, "text": "ü\n"}})
    logger.debug("not this")
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "info", "process": "attention-0", "logger": NAME, "message": "step 3",
        "request": "abc", "seconds": 0.5, "text": "ü\n",
    }  # fmt: skip


def test_an_error_has_its_traceback_in_the_line(logger, capsys):
    set_up_logs("controller", "json", "info", NAME)
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: bad" in json.loads(line)["error"]


def test_text_names_the_process(logger, capsys):
    set_up_logs("controller", "text", "warning", NAME)
    logger.warning("a link has failed")
    logger.info("not this")
    assert capsys.readouterr().err.endswith(f" controller {NAME} WARNING: a link has failed\n")


def test_text_has_the_events_own_fields_behind_its_message(logger, capsys):
    set_up_logs("ingress", "text", "info", NAME)
    fields = {"request": "abc", "stream": True, "cached": False, "finish": ["stop", "length"], "none": [], "n": 0}
    logger.info("step %d", 3, extra={FIELDS: fields | {"key": "", "first": None}})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" INFO: step 3 request=abc stream=yes cached=no finish=stop,length n=0")


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_was_sent_makes_no_line_of_its_own_and_steers_no_terminal(logger, capsys, form):
    set_up_logs("ingress", form, "info", NAME)
    logger.info("for %s", "a\nb\x1b[2J", extra={FIELDS: {"route": "c\r\nd\x9b\u2028e"}})
    said = capsys.readouterr().err
    (line,) = said.splitlines()
    assert said == f"{line}\n" and line.isprintable()
    if form == "json":
        assert json.loads(line)["message"] == "for a\nb\x1b[2J" and json.loads(line)["route"] == "c\r\nd\x9b\u2028e"
    else:
        assert line.endswith(r": for a\nb\x1b[2J route=c\r\nd\x9b\u2028e")


def test_setting_up_again_replaces_and_leaves_others_alone(logger):
    set_up_logs("a", "text", "info", NAME)
    set_up_logs("b", "json", "debug", NAME)
    (only,) = logger.handlers
    assert isinstance(only.formatter, JsonLines) and logger.level == logging.DEBUG and not logger.propagate
    logger.addHandler(logging.NullHandler())
    set_up_logs("c", "text", "error", NAME)
    assert len(logger.handlers) == 2 and logger.level == logging.DEBUG
