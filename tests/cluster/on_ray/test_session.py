"""Joining a Ray that is not there, or does not answer."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from isotherm.cluster.on_ray import session
from isotherm.cluster.on_ray.session import NoClusterError, ask_controller, attach


def test_a_head_that_stands_still_is_told_of_within_seconds(monkeypatch: pytest.MonkeyPatch):
    """Its system takes connections for it: Ray would wait for ever."""
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        begin = time.monotonic()
        with pytest.raises(NoClusterError, match=r"takes connections, and has not answered in 0\.3 s"):
            attach(f"127.0.0.1:{stopped.getsockname()[1]}")
    assert time.monotonic() - begin < 10


def test_a_port_where_nobody_listens_is_told_of_at_once():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(NoClusterError, match="no Ray cluster at"):
        attach(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("error", "words"),
    [(GetTimeoutError("some object(s) not ready"), "has not answered in 30 s"), (RayActorError(), "is gone: ")],
)
def test_a_controller_that_does_not_answer_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, error, words: str):
    """`isotherm status`, `top`, `stop` and `roll --ingress` ended with a traceback of Ray's."""

    def get(_: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr(session.ray, "get", get)
    with pytest.raises(NoClusterError, match=words):
        ask_controller(SimpleNamespace(status=SimpleNamespace(remote=lambda: None)), "status")
