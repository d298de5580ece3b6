"""What is known of workers that answer, are starting, hang, or are gone; and how long anybody waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from isotherm.cluster.deploy import worker_reports
from isotherm.cluster.deploy.worker_reports import WorkerReports
from isotherm.cluster.messages.membership import WorkerGoneError


class Worker:
    node_id = placement_group_id = None

    def __init__(self, name: str, answer: Any):
        self.id, self._answer, self.asked = name, answer, 0

    async def call(self, what: str) -> Any:
        self.asked += 1
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Worker]:
    monkeypatch.setattr(worker_reports, "ANSWER_SECONDS", 0.2)
    answers = {
        "up": {"loaded": True, "pid": 7},
        "loading": {"loaded": False, "pid": 8},
        "hangs": None,
        "gone": WorkerGoneError("it was killed"),
        "dead": None,
        "starting": None,
    }
    return {name: Worker(name, answer) for name, answer in answers.items()}


def test_each_has_its_state_and_nobody_waits_for_a_process_that_starts(workers: dict[str, Worker]):
    reports = WorkerReports({"dead": "it hung"})

    async def statuses() -> dict[str, dict[str, Any]]:
        with reports.starting("starting"):
            return {name: await reports.status("expert", worker) for name, worker in workers.items()}  # type: ignore[arg-type]

    told = asyncio.run(statuses())
    assert {name: status["state"] for name, status in told.items()} == {
        "up": "loaded",
        "loading": "loading",
        "hangs": "silent",
        "gone": "dead",
        "dead": "dead",
        "starting": "starting",
    }
    assert told["up"]["pid"] == 7 and told["starting"]["pid"] is None
    assert told["gone"]["reason"] == "it was killed" and told["dead"]["reason"] == "it hung"
    assert workers["starting"].asked == workers["dead"].asked == 0


def test_only_who_can_answer_is_asked_and_only_who_answers_counts(
    workers: dict[str, Worker], caplog: pytest.LogCaptureFixture
):
    """Of each other that was asked there is a line in the log."""
    workers["broken"] = Worker("broken", ValueError("the meter is broken"))
    reports = WorkerReports({"dead": "it hung"})

    async def ask() -> tuple[dict[str, Any], dict[str, Any]]:
        with reports.starting("starting"):
            during = await reports.ask("meter", workers, workers)  # type: ignore[arg-type]
        workers["starting"]._answer = {"loaded": False}
        return during, await reports.ask("meter", workers, ["starting"])  # type: ignore[arg-type]

    during, after = asyncio.run(ask())
    assert set(during) == {"up", "loading"} and set(after) == {"starting"}
    assert workers["starting"].asked == 1 and workers["dead"].asked == 0
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "hangs does not say its meter: TimeoutError"),
        ("WARNING", "gone does not say its meter: it was killed"),
        ("WARNING", "broken does not say its meter: the meter is broken"),
    ]


def test_one_whose_start_fails_is_not_starting_for_ever():
    reports = WorkerReports({})
    with pytest.raises(WorkerGoneError), reports.starting("x"):
        raise WorkerGoneError("no room")
    assert reports.answering(["x"]) == ["x"]


def test_who_is_lost_while_it_starts_is_named(workers):
    """Ray says that "the actor never ran", and the end of `isotherm serve` told of no worker."""
    reports = WorkerReports({})
    lost = "^expert-0 was lost while it started: The actor never ran$"
    with pytest.raises(WorkerGoneError, match=lost), reports.starting("expert-0"):
        raise RayActorError(error_msg="The actor never ran")
    with pytest.raises(ConnectionError, match="^as it is$"), reports.starting("expert-0"):
        raise ConnectionError("as it is")
    assert reports.answering(["expert-0"]) == ["expert-0"]
