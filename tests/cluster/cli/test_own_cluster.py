"""A cluster for the time of a command: up when entered, gone when left, gone too when its command is. What is started
here is a small server in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from waiting import until

from isotherm.cluster.cli import own_cluster
from isotherm.cluster.cli.own_cluster import OwnCluster, OwnClusterError, free_port, without_guests
from isotherm.cluster.manifest import load_manifest, parse_manifest
from isotherm.cluster.supervise.processes import runs_as

pytestmark = pytest.mark.slow

SERVER = """
import http.server, os, sys, time
from isotherm.cluster.supervise.processes import end_with_parent
end_with_parent({parent})
arguments = sys.argv[1:]
print("started", *arguments, flush=True)
if "fail" in arguments:
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    ready = time.monotonic() + 0.5

    def do_GET(self):
        self.send_response(200 if time.monotonic() > self.ready else 503)
        self.end_headers()
        self.wfile.write(("%d" % os.getpid()).encode())

http.server.HTTPServer(("127.0.0.1", int(arguments[-1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def small_server(monkeypatch):
    monkeypatch.setattr(own_cluster, "COMMAND", SERVER)


def test_it_is_there_while_it_is_used():
    with OwnCluster("tiny", "--address", "a") as cluster:
        answer = httpx.get(f"{cluster.url}/ready", trust_env=False)
        assert answer.status_code == 200
        logged = cluster._logged()
        assert logged.startswith("started serve tiny --address a --host 127.0.0.1 --port ")
    until(lambda: not runs_as(int(answer.text)))


def test_it_asks_nobody_for_a_key_and_needs_no_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ISOTHERM_API_KEY", "made-up-by-somebody-123")
    tls = {"certificate": "/c.pem", "key": "/k.pem"}
    given = {"model": "tiny", "experts": {"groups": 3}, "http": {"keys": "/k.json", "tls": tls, "aliases": ["a"]}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "plain.yaml").write_text("model: tiny")
    changed = load_manifest(Path(without_guests(str(tmp_path / "m.yaml"), tmp_path)))
    assert changed == parse_manifest({**given, "http": {"aliases": ["a"]}})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_manifest(Path(without_guests("~/m.yaml", tmp_path))) == changed
    for model in ("tiny", str(tmp_path / "plain.yaml")):
        assert without_guests(model, tmp_path) == model
    with OwnCluster("tiny") as cluster:
        pid = int(httpx.get(f"{cluster.url}/", trust_env=False).text)
        assert "ISOTHERM_API_KEY" not in psutil.Process(pid).environ()


def test_one_that_does_not_start_says_why():
    with pytest.raises(OwnClusterError, match="status 3:\nstarted serve fail"), OwnCluster("fail"):
        raise AssertionError("it is up")


def test_one_whose_command_fails_ends():
    with pytest.raises(KeyError), OwnCluster("tiny") as cluster:
        pid = int(httpx.get(f"{cluster.url}/", trust_env=False).text)
        raise KeyError
    until(lambda: not runs_as(pid))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a parent cannot be outlived by order")
def test_it_ends_when_its_command_is_killed(tmp_path: Path):
    code = (
        "import httpx, time\n"
        "from isotherm.cluster.cli import own_cluster\n"
        f"own_cluster.COMMAND = {SERVER!r}\n"
        "with own_cluster.OwnCluster('tiny') as cluster:\n"
        "    print(httpx.get(f'{cluster.url}/', trust_env=False).text, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # who is killed leaves its folder
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(command.stdout.readline())
    assert runs_as(pid)
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    until(lambda: not runs_as(pid))


def test_its_port_is_none_that_others_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray's processes ask the system for any port while the cluster starts, and one had the front door's."""
    said = tmp_path / "range"
    monkeypatch.setattr(own_cluster, "EPHEMERAL", said)
    for text, first, end in (("32768\t60999\n", 20000, 32768), ("20001 60999", 20000, 20001)):
        said.write_text(text)
        assert all(first <= free_port() < end for _ in range(50))
    for text in ("1024 65535", "", "any"):
        said.write_text(text)
        assert free_port() > 0
