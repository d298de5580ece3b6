"""Joining a Ray that is not there, or does not answer."""

from __future__ import annotations

import socket
import time

import pytest

from isotherm.cluster.on_ray import session
from isotherm.cluster.on_ray.session import NoClusterError, attach


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
