"""What `isotherm serve` does when something dies, hangs or is asked to end: events in, instructions out."""

from __future__ import annotations

import signal

import pytest

from isotherm.cluster.supervise.watchdog import (
    DRAIN_MARGIN,
    REFUSED_SECONDS,
    SILENT_SECONDS,
    STOP_SECONDS,
    VITAL,
    Answer,
    End,
    Phase,
    Say,
    Tell,
    Watchdog,
)

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
STOPPING = Say("stopping; open requests have 60 s to finish, a second signal ends them at once")


def serving(own_ray: bool = True) -> Watchdog:
    watchdog = Watchdog(60.0, own_ray)
    assert watchdog.on_message(0.0, {"event": "ray"}) == []
    assert watchdog.on_message(0.0, {"event": "serving"}) == []
    assert watchdog.phase is Phase.SERVING
    return watchdog


@pytest.mark.parametrize("number", [TERM, INT, HUP])
def test_the_first_signal_drains(number: int):
    watchdog = serving()
    assert watchdog.on_signal(10.0, number) == [STOPPING, Tell("drain")]
    assert watchdog.on_time(11.0) == []
    assert watchdog.on_message(30.0, {"event": "stopping"}) == []
    assert watchdog.on_driver_end(0) == [End(0, patience=3.0)]
    assert watchdog.phase is Phase.ENDED and watchdog.on_driver_end(0) == [] and watchdog.on_signal(31.0, TERM) == []


@pytest.mark.parametrize("stopping", [False, True])
def test_a_second_signal_ends_it_at_once(stopping: bool):
    watchdog = serving()
    watchdog.on_signal(10.0, TERM)
    if stopping:
        watchdog.on_message(12.0, {"event": "stopping"})
    assert watchdog.on_signal(13.0, INT) == [End(128 + INT, "ended at once by a second signal (SIGINT)")]


def test_one_event_that_comes_twice_is_one_signal():
    """A terminal that goes: the system sends SIGHUP, and so does its shell."""
    watchdog = serving()
    watchdog.on_signal(10.0, HUP)
    assert watchdog.on_signal(10.2, TERM) == []
    assert watchdog.on_signal(20.0, HUP) == []
    assert watchdog.phase is Phase.DRAINING


def test_before_it_serves_there_is_nothing_to_drain():
    assert Watchdog(60.0, own_ray=True).on_signal(1.0, TERM) == [Say("stopping"), End(0)]
    shared = Watchdog(60.0, own_ray=False)  # workers on a cluster of others: the driver must end them
    assert shared.on_signal(1.0, TERM) == [Say("stopping"), Tell("stop")]
    assert shared.on_driver_end(0) == [End(0, patience=3.0)]


@pytest.mark.parametrize("name", VITAL)
@pytest.mark.parametrize("phase", ["starting", "serving", "draining"])
def test_without_a_vital_process_it_ends(name: str, phase: str):
    watchdog = serving() if phase != "starting" else Watchdog(60.0, own_ray=True)
    if phase == "draining":
        watchdog.on_signal(1.0, TERM)
    (end,) = watchdog.on_process_end(name, 77)
    assert isinstance(end, End) and (end.status, end.patience) == (1, 0.0)
    assert f"Ray's {name} (process 77) has ended" in end.reason


def test_others_are_missed_in_a_line():
    watchdog = serving()
    (said,) = watchdog.on_process_end("dashboard", 77)
    assert isinstance(said, Say) and "ray job submit" in said.line
    assert watchdog.phase is Phase.SERVING


def test_while_it_stops_ray_may_go():
    watchdog = serving()
    watchdog.on_signal(1.0, TERM)
    watchdog.on_message(2.0, {"event": "stopping"})
    assert [watchdog.on_process_end(name, 7) for name in ("raylet", "dashboard")] == [[], []]


@pytest.mark.parametrize(("status", "words"), [(0, "status 0"), (1, "status 1"), (-6, "signal 6")])
def test_a_driver_that_ends_unasked_ends_it(status: int, words: str):
    (end,) = serving().on_driver_end(status)
    assert isinstance(end, End) and end.status == 1 and words in end.reason


def test_a_driver_that_has_failed_says_why():
    watchdog = Watchdog(60.0, own_ray=True)
    watchdog.on_message(3.0, {"event": "failed", "reason": "no room"})
    assert watchdog.on_process_end("raylet", 7) == []
    assert watchdog.on_driver_end(0) == [End(1, "no room", patience=2.0)]
    watchdog = Watchdog(60.0, own_ray=True)
    watchdog.on_message(3.0, {"event": "failed", "reason": "attention.gpus is 1", "logs": False})
    assert watchdog.on_driver_end(0) == [End(1, "attention.gpus is 1", patience=2.0, logs=False)]
    hangs = Watchdog(60.0, own_ray=True)
    hangs.on_message(3.0, {"event": "failed", "reason": "no room"})
    assert hangs.on_time(3.0 + STOP_SECONDS) == [End(1, "no room")]


def test_isotherm_stop_drains_too():
    watchdog = serving()
    assert watchdog.on_message(5.0, {"event": "draining"}) == [STOPPING]
    assert watchdog.on_signal(6.0, TERM) == []  # the first of this process
    assert watchdog.on_signal(8.0, TERM) == [End(128 + TERM, "ended at once by a second signal (SIGTERM)")]


def test_every_part_of_the_end_has_a_limit():
    watchdog = serving()
    watchdog.on_signal(100.0, TERM)
    assert watchdog.on_time(100.0 + 60.0 + DRAIN_MARGIN - 0.1) == []
    (end,) = watchdog.on_time(100.0 + 60.0 + DRAIN_MARGIN)
    assert end == End(1, "the drain took too long; what was left has been ended by force")
    watchdog = serving()
    watchdog.on_signal(100.0, TERM)
    watchdog.on_message(110.0, {"event": "stopping"})
    assert watchdog.on_time(110.0 + STOP_SECONDS - 0.1) == []
    (end,) = watchdog.on_time(110.0 + STOP_SECONDS)
    assert isinstance(end, End) and end.status == 1 and "stopping took too long" in end.reason


@pytest.mark.parametrize(("answer", "limit"), [(Answer.REFUSED, REFUSED_SECONDS), (Answer.SILENT, SILENT_SECONDS)])
def test_a_front_door_that_stays_shut_ends_it(answer: Answer, limit: float):
    watchdog = serving()
    look = [Tell("look")] if answer is Answer.REFUSED else []
    assert watchdog.on_answer(10.0, answer, "http://x") == look
    assert watchdog.on_answer(10.0 + limit - 0.1, answer, "http://x") == look
    assert watchdog.on_answer(10.0 + limit, Answer.GIVEN, "http://x") == []  # it is back
    assert watchdog.on_answer(11.0 + limit, answer, "http://x") == look
    (end,) = watchdog.on_answer(11.0 + 2 * limit, answer, "http://x")
    assert isinstance(end, End) and end.status == 1 and "http://x" in end.reason and f"{limit:.0f} s" in end.reason


def test_while_nothing_listens_the_driver_looks_after_the_proxy_now_and_then():
    watchdog = serving()
    times = [10.0, 10.2, 10.4, 10.5, 10.7, 11.1]
    assert [t for t in times if watchdog.on_answer(t, Answer.REFUSED, "u")] == [10.0, 10.5, 11.1]


def test_a_front_door_is_only_missed_while_it_serves():
    watchdog = Watchdog(60.0, own_ray=True)
    assert [watchdog.on_answer(t, Answer.REFUSED, "u") for t in (0.0, 100.0, 200.0)] == [[], [], []]
    watchdog = serving()
    watchdog.on_signal(1.0, TERM)
    assert [watchdog.on_answer(t, Answer.REFUSED, "u") for t in (2.0, 50.0)] == [[], []]
