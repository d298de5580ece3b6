"""The process that a user starts, over a driver that is no Ray: signals, a terminal that goes, what is left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from isotherm.cluster.supervise import supervisor
from isotherm.cluster.supervise.supervisor import probe
from isotherm.cluster.supervise.watchdog import Answer

pytestmark = pytest.mark.slow

SUPERVISOR = """
import sys
from pathlib import Path
from rich.console import Console
from isotherm.cluster.supervise import supervisor
from isotherm.cluster.manifest import parse_manifest
supervisor.DRIVER = sys.argv[1]
manifest = parse_manifest({"http": {"port": 1, "drain_seconds": 5}})
try:
    supervisor.serve_until_stopped(manifest, Path("/nowhere"), None, None, Console())
except supervisor.ServeError as error:
    print("isotherm:", error, file=sys.stderr)
    sys.exit(1)
"""
# A driver, its "raylet", and a worker below that in a session of its own. It is told what to do by the words between.
DRIVER = """
import json, os, subprocess, sys, threading, time
job = json.loads(sys.stdin.readline())
open(job["folder"] + "/log", "w").close()
def tell(event, **rest):
    os.write(int(sys.argv[1]), json.dumps({"event": event, **rest}).encode() + b"\\n")
worker = "import time; time.sleep(600)"
code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', %r], start_new_session=True); " + worker
raylet = subprocess.Popen([sys.executable, "-c", code % worker])
tell("ray", address="127.0.0.1:7", dashboard="127.0.0.1:8", processes={"raylet": raylet.pid})
tell("serving", probe=False)
print("up", raylet.pid, flush=True)
BODY
"""
OBEDIENT = 'word = sys.stdin.readline(); print("told", word.strip(), flush=True); tell("stopping"); raylet.kill()'


class Run:
    """A supervisor with that driver. `pids`: all below it, once it serves."""

    def __init__(self, body: str, **options: Any):
        command = [sys.executable, "-c", SUPERVISOR, DRIVER.replace("BODY", body)]
        self.process = subprocess.Popen(
            command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        )

    def wait_up(self) -> psutil.Process:
        """The raylet."""
        line = ""
        while not line.startswith("up "):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
        raylet = psutil.Process(int(line.split()[1]))
        deadline = time.monotonic() + 10
        while not raylet.children() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        assert len(self.family) == 3
        return raylet

    def end(self, timeout: float = 15.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        assert [p.pid for p in self.family if p.is_running()] == []
        return self.process.returncode, out, err


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files go to a folder of the test's own, for the processes that it starts too."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder


def test_temporary_files_of_what_is_killed_end_with_it(nothing_stays: Path):
    """Each server left a folder of Ray's dashboard in /tmp."""
    run = Run(f"import tempfile; tempfile.mkdtemp(prefix='pymp-'); {OBEDIENT}")
    run.wait_up()
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0
    assert list(nothing_stays.iterdir()) == []


def test_the_session_is_for_this_user_alone(nothing_stays: Path):
    """Ray lets every user write into the folder that it is given, where its sockets and logs are."""
    run = Run(f"os.chmod(job['folder'], 0o777); {OBEDIENT}")
    run.wait_up()
    (log,) = nothing_stays.glob("*/ray/log")
    assert log.parents[1].stat().st_mode & 0o777 == 0o700
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0


@pytest.mark.parametrize("number", supervisor.SIGNALS, ids=lambda s: s.name)
def test_a_signal_before_anything_is_started_leaves_nothing(number: signal.Signals, nothing_stays: Path):
    """It comes in the moment in which the session's folder is made, when there is no driver yet to be told of it."""
    at_once = (
        "import os, signal, tempfile\n"
        "made = tempfile.mkdtemp\n"
        "def mkdtemp(**options):\n"
        "    folder = made(**options)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    return folder\n"
        "tempfile.mkdtemp = mkdtemp\n"
    )
    command = [sys.executable, "-c", at_once + SUPERVISOR, DRIVER.replace("BODY", OBEDIENT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "stopping" in done.stdout.splitlines(), done
    assert list(nothing_stays.iterdir()) == []


@pytest.mark.parametrize("number", supervisor.SIGNALS, ids=lambda s: s.name)
def test_a_signal_is_passed_on_and_the_status_is_zero(number: signal.Signals, nothing_stays: Path):
    run = Run(OBEDIENT)
    run.wait_up()
    noted = nothing_stays / f"isotherm-{os.getuid()}" / f"{run.process.pid}.json"
    deadline = time.monotonic() + 10  # the driver's own output does not pass through the supervisor
    while not noted.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    said = {"address": "127.0.0.1:7", "dashboard": "127.0.0.1:8", "url": "http://127.0.0.1:1"}
    assert json.loads(noted.read_text()) == said
    run.process.send_signal(number)
    assert run.end() == (
        0,
        "stopping; open requests have 5 s to finish, a second signal ends them at once\ntold drain\n",
        "",
    )
    assert list(nothing_stays.iterdir()) == []


def test_a_second_signal_ends_a_driver_that_hangs(nothing_stays: Path):
    run = Run("time.sleep(600)")
    run.wait_up()
    run.process.send_signal(signal.SIGTERM)
    assert run.process.stdout.readline().startswith("stopping; ")
    time.sleep(1.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    status, out, _ = run.end(5)
    assert status == 143 and "by a second signal (SIGTERM)" in out
    assert list(nothing_stays.iterdir()) == []


def test_a_raylet_that_dies_ends_it_and_its_orphans(nothing_stays: Path):
    run = Run("time.sleep(600)")
    run.wait_up().kill()
    status, _, err = run.end(5)
    assert status == 1 and "Ray's raylet (process" in err and "has ended" in err
    (kept,) = nothing_stays.iterdir()
    assert f"Ray's logs are in {kept}/ray/session_latest" in err and (kept / "ray" / "log").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("os.abort()", "the process that drives Ray was ended by signal 6"),
        ("sys.exit(3)", "the process that drives Ray has ended with status 3"),
        ('tell("failed", reason="there is no room")', "isotherm: there is no room"),
    ],
)
def test_a_driver_that_ends_ends_it(body: str, words: str):
    run = Run(f"time.sleep(1); {body}")
    run.wait_up()
    status, _, err = run.end(8)
    assert status == 1 and words in err


def test_a_driver_that_is_killed_as_it_writes_ends_it_and_its_orphans():
    """The supervisor ended in the midst of it, and Ray's processes stayed."""
    run = Run("""os.write(int(sys.argv[1]), b'{"event": "fai'); time.sleep(0.5); os.kill(os.getpid(), 9)""")
    run.wait_up()
    status, _, err = run.end()
    assert status == 1 and "the process that drives Ray was ended by signal 9" in err


def test_a_bug_leaves_no_process():
    """What the driver says is taken as it is."""
    run = Run('time.sleep(0.5); tell("ray", processes=7); time.sleep(600)')
    run.wait_up()
    status, _, err = run.end()
    assert status == 1 and "AttributeError" in err


def test_signals_that_it_was_started_to_ignore_stay_ignored():
    """SIGHUP under nohup, SIGINT for a background job of a script."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    run = Run(OBEDIENT, preexec_fn=ignore)
    run.wait_up()
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0


def test_a_terminal_that_is_gone_is_no_error(tmp_path: Path, nothing_stays: Path):
    ours, theirs = pty.openpty()
    up = tmp_path / "up"
    told = tmp_path / "told"
    body = f"open({str(up)!r}, 'w').close(); open({str(told)!r}, 'w').write(sys.stdin.readline()); "
    body += "tell('stopping'); raylet.kill()"
    run = Run(body, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    while not up.exists():
        time.sleep(0.05)
    os.close(ours)  # from now on to write is an error
    run.process.send_signal(signal.SIGHUP)
    assert run.process.wait(15) == 0
    assert told.read_text() == "drain\n"
    assert list(nothing_stays.iterdir()) == []


# --- the front door -------------------------------------------------------------------------------


class _Busy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_what_a_probe_finds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(supervisor, "PROBE_TIMEOUT", 0.3)
    with HTTPServer(("127.0.0.1", 0), _Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert probe(f"http://127.0.0.1:{server.server_port}") is Answer.GIVEN
        server.shutdown()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert probe(f"http://127.0.0.1:{port}") is Answer.REFUSED
        silent.listen()
        assert probe(f"http://127.0.0.1:{port}") is Answer.SILENT
