"""`isotherm serve` as a process of its own, for the time of a command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

import httpx

from isotherm.cluster.client.calls import API_KEY
from isotherm.cluster.errors import IsothermError

START_SECONDS, STOP_SECONDS = 600.0, 60.0
# It ends when whoever asked for it is gone, however that ended.
COMMAND = (
    "from isotherm.cluster.supervise.processes import end_with_parent; end_with_parent({parent}); "
    "from isotherm.cluster.cli.main import main; main()"
)


class OwnClusterError(IsothermError, RuntimeError):
    """The cluster did not start; the message has what it said."""


class OwnCluster:
    """Context manager: up when entered, gone when left. `arguments` are those of `isotherm serve`, MODEL first; the
    port is a free one of this machine's loopback. Raises OwnClusterError."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    def __enter__(self) -> OwnCluster:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port)]
        command = [sys.executable, "-c", COMMAND.format(parent=os.getpid()), "serve", *self._arguments, *where]
        self._log: IO[bytes] = tempfile.TemporaryFile()
        # A session of its own: who interrupts the command has the cluster ended by __exit__, not twice.
        # Nobody else shall ask it, so it asks for no key.
        environment = {name: value for name, value in os.environ.items() if name != API_KEY}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=environment,
        )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # Not SIGINT: below a shell that has put the command in the background it is ignored.
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise OwnClusterError(f"isotherm serve ended with status {self._process.returncode}:\n{self._logged()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise OwnClusterError(f"isotherm serve was not ready in {START_SECONDS:g} s:\n{self._logged()}")

    def _logged(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()
