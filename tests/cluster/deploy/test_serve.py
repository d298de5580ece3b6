"""The deciding parts of the driver, without a Ray: when it stops, how it drains, whom `isotherm stop` takes for gone,
and what it says of who may reach which routes."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from isotherm.cluster.deploy import serve as serving
from isotherm.cluster.deploy.ingress_update import beside_the_front_door
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.supervise import watchdog


@pytest.fixture
def stop() -> Iterator[serving._Stop]:
    before = signal.getsignal(signal.SIGINT)
    stop = serving._Stop()
    signal.signal(signal.SIGINT, stop.on_signal)
    yield stop
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("words", "at_once"), [(["drain\n"], False), (["stop\n"], True), ([], True)])
def test_it_stops_on_a_word_and_when_nobody_is_left_to_say_one(stop: serving._Stop, words: list[str], at_once: bool):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out, os.fdopen(reader) as lines:
        listening = threading.Thread(target=stop.listen, args=(lines,), daemon=True)
        listening.start()
        assert not stop.asked
        if words:
            out.writelines(words)
            out.flush()
        else:
            out.close()
        deadline = time.monotonic() + 10
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (stop.asked, stop.at_once) == (True, at_once)
        out.close()
        listening.join(10)


def test_a_look_after_the_proxy_stops_nothing(stop: serving._Stop, monkeypatch: pytest.MonkeyPatch):
    looks: list[bool] = []
    monkeypatch.setattr(stop._proxy, "look", lambda: looks.append(stop.asked))
    stop.listen(io.StringIO("look\nlook\ndrain\n"))
    assert looks == [False, False] and stop.asked


def test_what_blocks_is_left_when_it_is_time(stop: serving._Stop):
    begin = time.monotonic()
    threading.Timer(0.2, lambda: stop.listen(io.StringIO("drain\n"))).start()
    stop.until_set(lambda: time.sleep(60))
    assert time.monotonic() - begin < 30
    done: list[int] = []
    stop.until_set(lambda: done.append(1))
    assert done == [], "what was not begun is not begun any more"


def test_an_error_is_an_error_until_it_is_time(stop: serving._Stop):
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stop.until_set(fail)
    stop.asked = True
    stop.until_set(fail)


class FakeServe:
    """An application that goes `seconds` after it was deleted."""

    def __init__(self, seconds: float):
        self.seconds, self.gone = seconds, float("inf")

    def delete(self, name: str, _blocking: bool) -> None:
        assert (name, _blocking) == ("isotherm", False)
        self.gone = time.monotonic() + self.seconds

    def status(self) -> Any:
        return SimpleNamespace(applications={"isotherm": 1} if time.monotonic() < self.gone else {})


@pytest.mark.parametrize(("needed", "given", "waited"), [(0.3, 5.0, 0.3), (60.0, 0.2, 0.4)])
def test_a_drain_ends_when_the_ingress_has_or_its_time_is_over(
    needed: float, given: float, waited: float, monkeypatch: Any
):
    monkeypatch.setattr(serving, "serve", FakeServe(needed))
    monkeypatch.setattr(serving, "DRAIN_SLACK", 0.2)
    begin = time.monotonic()
    serving.drain_ingress(given, serving._Stop())
    assert waited <= time.monotonic() - begin < waited + 3


def test_a_drain_is_given_up_when_nobody_waits_for_it(monkeypatch: Any):
    monkeypatch.setattr(serving, "serve", FakeServe(60))
    stop = serving._Stop()
    threading.Timer(0.2, lambda: setattr(stop, "at_once", True)).start()
    begin = time.monotonic()
    serving.drain_ingress(60, stop)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("answers", "taken_up"), [
    ([False, True], True), ([False], False), ([RayActorError()], True),
    ([GetTimeoutError()], False), ([GetTimeoutError(), True], True),
])  # fmt: skip
def test_a_process_that_does_not_take_up_the_end_is_gone(answers: list[Any], taken_up: bool, monkeypatch: Any):
    left = list(answers)

    def get(_reference: Any, timeout: float) -> bool:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(serving.ray, "get", get)
    monkeypatch.setattr(serving, "ABSENT_SECONDS", 0.5)
    controller = SimpleNamespace(ending=SimpleNamespace(remote=lambda: None))
    assert serving._taken_up(controller) is taken_up


# --- Kubernetes -----------------------------------------------------------------------------------


def test_a_change_of_the_front_door_alone_keeps_the_workers():
    before = parse_manifest({"experts": {"groups": 3}})
    same = {"experts": {"groups": 3}, "http": {"replicas": 3, "drain_seconds": 5}, "served_name": "other"}
    assert beside_the_front_door(before, parse_manifest(same), model=True) == []
    others = {"experts": {"groups": 4}, "model": "other", "isa": "avx2"}
    differing = [change.field for change in beside_the_front_door(before, parse_manifest(others), model=True)]
    assert differing == ["model", "isa", "experts.groups"]


def test_an_end_takes_less_than_the_supervisor_waits():
    steps = serving.INGRESS_SECONDS, serving.FORGET_SECONDS, serving.WORKERS_SECONDS, serving.RAY_SECONDS
    assert sum(steps) < watchdog.STOP_SECONDS and serving.CONTROLLER_END_SECONDS < serving.WORKERS_SECONDS
