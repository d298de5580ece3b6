"""Every error of our own is an IsothermError, is told of in its docstring, and crosses processes whole; and what an
error says in one line."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from isotherm.cluster.api.choices import OwnFaultError
from isotherm.cluster.api.errors import ContextLengthError, ReplyError, StreamedError
from isotherm.cluster.client import APIError, OutputError
from isotherm.cluster.errors import IsothermError, named_line, one_line, without_class
from isotherm.cluster.manifest import ManifestError
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.operations import OperationError
from isotherm.cluster.text.tool_formats.grammar import ToolSchemaError

ROOT = Path(__file__).parents[2]


def _errors() -> Iterator[type[BaseException]]:
    """Every public class of cluster and actors that can be raised; a private one is a module's way out of its own
    calls."""
    for path in sorted([*(ROOT / "cluster").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]):
        name = ".".join(("isotherm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for found in vars(importlib.import_module(name)).values():
            ours = inspect.isclass(found) and found.__module__ == name and not found.__name__.startswith("_")
            if ours and issubclass(found, BaseException):
                yield found


ERRORS = list(_errors())


def _name(kind: type[BaseException]) -> str:
    return f"{kind.__module__.removeprefix('isotherm.')}.{kind.__name__}"


def test_there_is_something_to_check():
    assert {ManifestError, APIError, ReplyError, WorkerGoneError} < set(ERRORS) and len(ERRORS) > 30


@pytest.mark.parametrize("kind", ERRORS, ids=_name)
def test_every_error_of_ours_is_one(kind: type[BaseException]):
    assert issubclass(kind, IsothermError)


def test_the_docstring_tells_of_all_errors_and_of_no_other():
    told = re.findall(r"^ {6,8}((?:\w+Error(?:, )?)+)  +(\S+)", IsothermError.__doc__ or "", re.MULTILINE)
    names = [name for names, _ in told for name in names.split(", ")]
    assert sorted(names) == sorted(kind.__name__ for kind in ERRORS if kind is not IsothermError)
    places = {place.rstrip(":,") for _, place in told if place.startswith(("cluster.", "actors."))}
    assert places <= {kind.__module__.removeprefix("isotherm.") for kind in ERRORS}


# --- from one process to another ------------------------------------------------------------------

TAKE_MORE = [
    ContextLengthError("messages: no", "messages", "9 tokens > 8"),
    ReplyError("no", status=404, param="model", code="model_not_found", kind="not_found_error", headers={"a": "b"}),
    StreamedError(ReplyError("no", code="context_length_exceeded"), b"data: {}\n\n"),
    *(kind(503, "later", param="model", code="busy") for kind in ERRORS if issubclass(kind, APIError)),
    *(kind("cut", "{") for kind in ERRORS if issubclass(kind, OutputError)),
    OperationError("no", field="copies", conflict=True),
    ToolSchemaError("weather", "its pattern is too large"),
    OwnFaultError("bad_words: nothing is left", "bad_words"),
]


def _more_than_a_message(kind: type[BaseException]) -> bool:
    return any("__init__" in vars(base) for base in kind.__mro__ if issubclass(base, IsothermError))


def test_every_class_that_takes_more_than_a_message_has_an_example():
    assert {type(error) for error in TAKE_MORE} == {kind for kind in ERRORS if _more_than_a_message(kind)}


@pytest.mark.parametrize("library", [pickle, cloudpickle], ids=lambda library: library.__name__)
@pytest.mark.parametrize(
    "error",
    [*TAKE_MORE, *(kind("what was wrong") for kind in ERRORS if not _more_than_a_message(kind))],
    ids=lambda error: _name(type(error)),
)
def test_an_error_crosses_processes(library, error: IsothermError):
    other = library.loads(library.dumps(error))
    assert type(other) is type(error) and str(other) == str(error)
    assert other.args == error.args and vars(other) == vars(error)


@pytest.mark.parametrize("error", [*TAKE_MORE, WorkerGoneError("gone")], ids=lambda error: _name(type(error)))
def test_an_error_of_an_actor_is_caught_by_its_own_class(error: IsothermError, monkeypatch: pytest.MonkeyPatch):
    """As Ray raises it where the answer is asked for."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    text = f'ray::Worker.load()\n  File "x.py", line 1, in load\n    raise {type(error).__name__}\nreason: {error}'
    raised = RayTaskError("load", text, error, proctitle="ray::Worker").as_instanceof_cause()
    assert isinstance(raised, type(error)) and one_line(raised) == f"reason: {error}"
    for name, value in vars(error).items():
        assert getattr(raised, name) == value
    again = cloudpickle.loads(cloudpickle.dumps(raised))
    assert isinstance(again, type(error)) and str(again) == str(raised)


# --- in one line ----------------------------------------------------------------------------------

TRACEBACK = (
    'ray::W.load() (pid=1, ip=10.0.0.1)\n  File "x", line 1, in load\n    raise ValueError\nValueError: no room\n'
)
ACTOR_DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Shard\n\tpid: 12\n"
    "The actor is dead because its worker process has died."
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no room"), "no room"),
        (ValueError("no room\nframe #0: somewhere\nframe #1: elsewhere"), "no room"),
        (OSError("\n no room \n"), "no room"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError(" \n\t"), "RuntimeError"),
        (RuntimeError(TRACEBACK), "ValueError: no room"),
        (RuntimeError(TRACEBACK + "\n  at end\n"), "ValueError: no room"),
        (RuntimeError(ACTOR_DIED), "The actor is dead because its worker process has died."),
        (ValueError('while parsing\nexpected "]"\n  in "m.yaml", line 1'), "while parsing"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str):
    assert one_line(error) == line
    name = type(error).__name__
    assert named_line(error) == (name if line == name else f"{name}: {line}")


def test_what_ray_guesses_about_a_dead_process_is_left_out():
    said = (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file."
    )
    guesses = " Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) "
    assert one_line(RuntimeError(f"{said}{guesses}ray stop --force was called.")) == said


def test_an_error_of_ours_that_came_through_ray_is_said_without_its_class():
    line = "isotherm.cluster.messages.membership.WorkerGoneError: expert-2 was lost while it started: it was killed"
    assert without_class(line) == "expert-2 was lost while it started: it was killed"
    assert without_class("The actor died: it was killed") == "The actor died: it was killed"
