"""A real `isotherm serve` in a process of its own, on a free port, with a check that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil
import shared_memory
import yaml

from isotherm.cluster.cli.own_cluster import free_port

ISOTHERM = str(Path(sys.executable).with_name("isotherm"))
START_SECONDS, STOP_SECONDS = 120.0, 60.0


class Served:
    """Context manager: up when entered (GET /ready is 200), down and gone when left."""

    def __init__(
        self, manifest: dict[str, Any], folder: Path, *arguments: str, environment: dict[str, str] | None = None
    ):
        """`arguments` of `isotherm serve` after the manifest; `environment`: what differs from this process's."""
        self.arguments, self.environment = arguments, os.environ | (environment or {})
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.verify: ssl.SSLContext | bool = True  # what an HTTPS client needs to trust it
        self.manifest = folder / "manifest.yaml"
        self.manifest.write_text(yaml.safe_dump(manifest | {"http": manifest.get("http", {}) | {"port": self.port}}))
        self.log = folder / "serve.log"
        self.ray_folders: list[Path] = []  # of a Ray that it joins
        self.start_as: dict[str, Any] = {}  # options of Popen

    def __enter__(self) -> Served:
        self._shared_files: set[str] = set()
        begin = time.monotonic()
        with open(self.log, "w") as log:
            command = [ISOTHERM, "serve", str(self.manifest), *self.arguments]
            options = {"stdout": log, "stderr": log, "env": self.environment} | self.start_as
            self.process = subprocess.Popen(command, **options)
        self._family: dict[int, psutil.Process] = {}
        looks = 0
        with httpx.Client(verify=self.verify, timeout=5) as client:
            while time.monotonic() < begin + START_SECONDS:
                if looks % 10 == 0:  # it costs more than all else here, on cores that the cluster is starting on
                    self.remember_processes()
                looks += 1
                if self.process.poll() is not None:
                    raise RuntimeError(f"isotherm serve ended with {self.process.returncode}:\n{self.log.read_text()}")
                try:
                    if client.get(f"{self.url}/ready").status_code == 200:
                        self.remember_processes()
                        return self
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
        self.stop()
        raise TimeoutError(f"not ready after {START_SECONDS} s:\n{self.log.read_text()}")

    def remember_processes(self) -> None:
        """Ray's workers are children of its raylet, which is our grandchild; remembered while the tree still hangs
        together."""
        for process in (
            psutil.Process(self.process.pid).children(recursive=True) if psutil.pid_exists(self.process.pid) else []
        ):
            self._family[process.pid] = process
        self._shared_files |= shared_memory.files(self._family.values())

    def __exit__(self, *_: object) -> None:
        self.remember_processes()
        self.stop()
        for folder in re.findall("Ray's logs are in (.+)/ray/session_latest", self.log.read_text()):
            shutil.rmtree(folder, ignore_errors=True)  # kept for a person to read

    def ray_folder(self) -> Path:
        """Of its Ray's session, and what Ray keeps beside it."""
        self.remember_processes()
        return next(iter(self.ray_folders or _ray_folders(self._family.values())))

    def wait_ready(self) -> None:
        """Until it has said so, which is a moment after GET /ready does."""
        deadline = time.monotonic() + START_SECONDS
        while "ready  " not in self.log.read_text():
            if time.monotonic() > deadline:
                raise TimeoutError(self.log.read_text())
            time.sleep(0.05)
        self.remember_processes()

    def process_is_there(self, pid: int) -> bool:
        self.remember_processes()
        return psutil.pid_exists(pid)

    def find(self, *titles: str) -> psutil.Process:
        """The process of its tree whose command line begins, or whose program is named, so."""
        self.remember_processes()
        for process in self._family.values():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if " ".join(line).startswith(titles) or (line and Path(line[0]).name in titles):
                    return process
        raise LookupError(f"no process is titled {titles}")

    def has(self, *titles: str) -> bool:
        try:
            return self.find(*titles).is_running()
        except LookupError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                for process in [*self._family.values(), self.process]:
                    with contextlib.suppress(psutil.NoSuchProcess):  # by now its pid may be another's: psutil looks
                        process.kill()
                raise

    def left_over(self, patience: float = 10.0) -> dict[str, list[str]]:
        """What the stopped cluster left: processes of its tree (a moment is given to them), and with them the memory of
        links; and files in /dev/shm that these processes had."""
        _, alive = psutil.wait_procs(list(self._family.values()), timeout=patience)
        files = shared_memory.still_there(self._shared_files)
        return {"processes": [f"{p.pid} {p.name()}" for p in alive], "shared memory": files}

    def ray_address(self) -> str:
        """Of the local Ray that it has started."""
        return json.loads(
            (Path(tempfile.gettempdir()) / f"isotherm-{os.getuid()}" / f"{self.process.pid}.json").read_text()
        )["address"]

    def logged(self, since: float) -> list[str]:
        """What controller, workers and ingress have logged since a moment (of time.time), in order, also those that are
        gone; and what Ray Serve's proxies and its controller have warned of."""
        self.remember_processes()
        begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        lines = []
        for folder in self.ray_folders or _ray_folders(self._family.values()):
            for path in folder.glob("session_2*/logs/**/*.err"):
                lines += [
                    line
                    for line in path.read_text(errors="replace").splitlines()
                    if _LOGGED.match(line) and line >= begin
                ]
            for path in folder.glob("session_2*/logs/serve/*.log"):
                warned = map(_WARNED.match, path.read_text(errors="replace").splitlines())
                lines += [
                    f"{line[2]} {line[1]} of Ray Serve's {line[3]}" for line in warned if line and line[2] >= begin
                ]
        return sorted(lines)

    def command(self, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [ISOTHERM, *arguments]
        options: dict[str, Any] = {"capture_output": True, "text": True, "env": self.environment | environment}
        return subprocess.run(command, timeout=timeout, **options)

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/status", timeout=30).json()

    def kv_blocks_used(self) -> int:
        return sum(w["kv_blocks_used"] for w in self.status()["workers"] if w["role"] == "attention")


_WARNED = re.compile(r"(WARNING|ERROR) (\d{4}-\d\d-\d\d [\d:,]+) (.*)")  # as Serve writes them
_LOGGED = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ \S+ isotherm")


def _ray_folders(processes: Iterable[psutil.Process]) -> list[Path]:
    """Those in which the raylets among these processes keep their sessions."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(word.partition("=")[2] for word in process.cmdline() if word.startswith("--temp_dir="))
    return [Path(folder) for folder in sorted(found)]


def generate(model: str, *arguments: str) -> dict[str, Any]:
    """`isotherm generate … --json` as a process of its own."""
    done = subprocess.run(
        [ISOTHERM, "generate", model, *arguments, "--json"], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)
