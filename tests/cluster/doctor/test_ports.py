"""What is said of ports, and what is found of ones that are free, taken, and ours."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from certificates import make_certificate
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


def looked(port: int, host: str = "127.0.0.1") -> PortFacts:
    return look_at_ports(host, port, f"http://{host}:{port}")


def test_what_is_found():
    assert looked(free_port()).refused == ""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        taken.settimeout(0.1)
        facts = looked(taken.getsockname()[1])
    assert "nothing can listen" in facts.refused and not facts.serves
    with http_server(build_app(FakeEngine(10), None, "m")) as url:  # type: ignore[arg-type]
        assert looked(int(url.rpartition(":")[2])).serves


def test_one_of_ours_with_a_certificate_is_ours(tmp_path: Path):
    """Whatever the manifest at hand says, and though nobody trusts the certificate."""
    certificate, key = make_certificate(tmp_path, "127.0.0.1")
    app = build_app(FakeEngine(10), None, "m")  # type: ignore[arg-type]
    with http_server(app, ssl_certfile=str(certificate), ssl_keyfile=str(key)) as url:
        port = int(url.rpartition(":")[2])
        assert looked(port).serves and look_at_ports("127.0.0.1", port, f"https://127.0.0.1:{port}").serves


def test_one_of_ours_at_another_address_is_ours():
    class Alive(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "alive"}')

    with HTTPServer(("127.0.0.2", 0), Alive) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        facts = looked(server.server_port, "127.0.0.2")
        server.shutdown()
        thread.join()
    assert facts.refused and facts.serves
