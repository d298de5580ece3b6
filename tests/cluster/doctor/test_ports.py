"""What is said of ports, and what is found of ones that are free, taken, and ours."""

from __future__ import annotations

import socket
from dataclasses import replace

from fake_engine import FakeEngine, http_server

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli.own_cluster import free_port
from isotherm.cluster.doctor.ports import PortFacts, judge_ports, look_at_ports

GOOD = PortFacts("127.0.0.1", 8000, "", False, (32768, 60999), "127.0.0.1")


def states(facts: PortFacts) -> dict[str, str]:
    return {finding.subject: finding.state.value for finding in judge_ports(facts)}


def test_what_is_said():
    assert set(states(GOOD).values()) == {"ok"}
    assert states(replace(GOOD, refused="taken", serves=True))["front door"] == "ok"
    assert states(replace(GOOD, refused="taken"))["front door"] == "fail"
    assert states(replace(GOOD, ephemeral=(60000, 60999)))["ports"] == "warn"
    assert states(replace(GOOD, localhost=""))["localhost"] == "fail"


def test_what_is_found():
    port = free_port()
    assert look_at_ports("127.0.0.1", port).refused == ""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        taken.settimeout(0.1)
        facts = look_at_ports("127.0.0.1", taken.getsockname()[1])
    assert "nothing can listen" in facts.refused and not facts.serves
    with http_server(build_app(FakeEngine(10), None, "m")) as url:  # type: ignore[arg-type]
        assert look_at_ports("127.0.0.1", int(url.rpartition(":")[2])).serves
