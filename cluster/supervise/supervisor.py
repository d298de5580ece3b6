"""`isotherm serve` as its user sees it: starts the driver (cluster/deploy/serve.py), which holds Ray, watches it, Ray's
processes and the front door, takes the signals, and leaves nothing behind. What to do when is
cluster/supervise/watchdog.py's; this module does it. Imports no Ray: it works when Ray does not."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import queue
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from rich.console import Console

from isotherm.cluster.background import spawn_thread
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.on_ray.run_file import run_file
from isotherm.cluster.supervise.processes import adopt_orphans, end_all_below, reap, runs, titled
from isotherm.cluster.supervise.terminal import outlast_terminal
from isotherm.cluster.supervise.watchdog import Answer, End, Instruction, Say, Tell, Watchdog

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_SECONDS = 0.2  # from one look at the processes to the next
PROBE_SECONDS, PROBE_TIMEOUT = 1.0, 5.0
RETRY_SECONDS = 0.2  # instead, while nothing listens: a moment in which something did must not be missed
END_SECONDS = 5.0  # for processes that have been killed to be gone
AGENTS = {  # children of the raylet, by their titles
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime env agent",
}
DRIVER = "from isotherm.cluster.deploy.serve import main; main()"


class ServeError(IsothermError, RuntimeError):
    """The cluster could not be started, or has ended by itself."""


def serve_until_stopped(
    manifest: Manifest, model_path: Path, address: str | None, keys: JSON | None, console: Console
) -> None:
    """Blocks until a signal or `isotherm stop`. With an address, joins that Ray; else starts a local one and ends it.
    `keys`: where the front door has its keys from (`key_source_as_json`). Raises ServeError, and SystemExit where a
    second signal has ended it at once."""
    outlast_terminal()
    console.print(
        "starting Ray" if address is None else f"joining Ray at {address}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    supervisor = _Supervisor(Watchdog(manifest.http.drain_seconds, own_ray=address is None), manifest, console)
    supervisor.take_signals()  # before there is a folder: from now on none ends this process past what removes it
    # A short path: Unix sockets have room for 107 characters in all. Ray opens the folder that it is given, and most of
    # what it makes there, to every user of the machine: so it gets one inside a folder that is this user's alone.
    folder = tempfile.mkdtemp(prefix="isotherm-") if address is None else None
    of_ray = None if folder is None else f"{folder}/ray"
    keep = False
    try:
        if of_ray is not None:
            os.mkdir(of_ray)
        job = {
            "manifest": manifest.model_dump(mode="json"),
            "path": str(model_path),
            "address": address,
            "keys": keys,
            "folder": of_ray,
            "pid": os.getpid(),
        }
        end = supervisor.run(job)
        keep = end.status == 1 and end.logs
    finally:
        if folder is not None and not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if end.status == 1:
        raise ServeError(end.reason + (f"\nRay's logs are in {of_ray}/session_latest/logs" if keep and of_ray else ""))
    if end.status:
        console.print(end.reason, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(end.status)


class _Supervisor:
    """Puts everything that happens into one queue and does what the watchdog says."""

    def __init__(self, watchdog: Watchdog, manifest: Manifest, console: Console):
        self._watchdog, self._console = watchdog, console
        self._url = manifest.url
        # Its `put` may be called in a signal handler.
        self._events: queue.SimpleQueue[Callable[[], Sequence[Instruction]]] = queue.SimpleQueue()
        self._watched: dict[str, psutil.Process] = {}
        self._gone: list[str] = []  # of the watched, at the last look
        self._end: End | None = None
        self._files = contextlib.ExitStack()

    def take_signals(self) -> None:
        """From now on they are events. One that this process was started to ignore stays ignored: SIGHUP under nohup,
        SIGINT for a background job of a script."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def run(self, job: Mapping[str, Any]) -> End:
        """Until it is over, one way or another."""
        adopt_orphans()
        with self._files:
            try:
                self._start_driver(job)
                while self._end is None:
                    with contextlib.suppress(queue.Empty):
                        self._do(self._events.get(timeout=LOOK_SECONDS)())
                    self._do(self._look())
            except BaseException:  # a bug; what it has started must not stay all the same
                end_all_below(os.getpid(), 0.0, END_SECONDS)
                raise
            left, statuses = end_all_below(os.getpid(), self._end.patience, END_SECONDS)
            self._driver.returncode = statuses.get(self._driver.pid, self._driver.returncode)
        if left:
            return End(1, f"{self._end.reason or 'stopped'}; these processes could not be ended: {', '.join(left)}")
        return self._end

    def _start_driver(self, job: Mapping[str, Any]) -> None:
        """In a session of its own, where a terminal's signals do not reach it: what they mean is decided here. From the
        root, as Ray's driver must be (cluster/on_ray/session.py)."""
        reader, writer = os.pipe()
        command = [sys.executable, "-c", DRIVER, str(writer)]
        # Temporary files of Ray's processes, which are killed and leave them, end with the session's folder.
        folder = job["folder"]
        self._driver = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[writer],
            start_new_session=True,
            cwd=os.path.abspath(os.sep),
            env=None if folder is None else os.environ | {"TMPDIR": folder},
        )
        os.close(writer)
        self._tell(json.dumps(job))
        self._reader = spawn_thread("driver's messages", lambda: self._read(reader))

    def _read(self, reader: int) -> None:
        with open(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:  # it was killed as it wrote; that it has ended is seen elsewhere
                    log.warning("the driver's last message is not whole: %.200s", line)
                    continue
                self._events.put(partial(self._on_message, message))

    def _tell(self, line: str) -> None:
        assert self._driver.stdin is not None
        with contextlib.suppress(OSError):  # it has just ended, which is seen elsewhere
            self._driver.stdin.write(line.encode() + b"\n")
            self._driver.stdin.flush()

    # --- what happens -----------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        self._events.put(lambda: self._watchdog.on_signal(now, number))

    def _on_message(self, message: Mapping[str, Any]) -> Sequence[Instruction]:
        if message["event"] == "ray":
            for name, pid in message["processes"].items():
                self._watch(name, pid)
            self._files.enter_context(run_file(message["address"], message["dashboard"], self._url, self._say))
        elif message["event"] == "serving" and message["probe"]:
            spawn_thread("front door probe", self._probe)
        return self._watchdog.on_message(time.monotonic(), message)

    def _watch(self, name: str, pid: int) -> None:
        try:
            self._watched[name] = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._events.put(lambda: self._watchdog.on_process_end(name, pid))

    def _look(self) -> list[Instruction]:
        """At the clock and at every process."""
        said: list[Instruction] = []
        for pid, status in reap().items():
            if pid == self._driver.pid:
                self._driver.returncode = status  # nobody else can ask for it now
                self._reader.join(1.0)  # what it has said last comes first
                self._events.put(partial(self._watchdog.on_driver_end, status))
        if (raylet := self._watched.get("raylet")) is not None and (missing := AGENTS.keys() - self._watched.keys()):
            self._watched |= titled(raylet.pid, missing)
        # A look later: what the driver has said before may say why.
        for name in self._gone:
            said += self._watchdog.on_process_end(AGENTS.get(name, name), self._watched.pop(name).pid)
        self._gone = [name for name, process in self._watched.items() if not runs(process)]
        return [*said, *self._watchdog.on_time(time.monotonic())]

    def _probe(self) -> None:
        """Ask the front door's port, again and again, as long as this process lives."""
        answer = Answer.GIVEN
        while True:
            time.sleep(RETRY_SECONDS if answer is Answer.REFUSED else PROBE_SECONDS)
            answer = probe(self._url)
            self._events.put(partial(self._watchdog.on_answer, time.monotonic(), answer, self._url))

    # --- what is done -----------------------------------------------------------------------------

    def _do(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Say):
                self._say(instruction.line)
            elif isinstance(instruction, Tell):
                self._tell(instruction.word)
            elif self._end is None:
                self._end = instruction

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def probe(url: str) -> Answer:
    """Whether a server answers GET /health there, with whatever status: only a process that lives can answer. No proxy
    is asked, and nothing is told that a certificate would have to be looked at for."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        context = ssl._create_unverified_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=PROBE_TIMEOUT, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT)
    try:
        connection.request("GET", "/health")
        connection.getresponse().read()
    except ConnectionRefusedError:
        return Answer.REFUSED
    except (OSError, http.client.HTTPException):
        return Answer.SILENT
    finally:
        connection.close()
    return Answer.GIVEN
