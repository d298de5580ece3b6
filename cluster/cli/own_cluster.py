"""`isotherm serve` as a process of its own, for the time of a command."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import httpx
import yaml

from isotherm.cluster.client.calls import API_KEY
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.manifest import load_manifest

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LEAST_PORT, MOST_TRIES = 20000, 100  # Ray's own workers listen below it
START_SECONDS, STOP_SECONDS = 600.0, 60.0
# It ends when whoever asked for it is gone, however that ended.
COMMAND = (
    "from isotherm.cluster.supervise.processes import end_with_parent; end_with_parent({parent}); "
    "from isotherm.cluster.cli.main import main; main()"
)


def free_port() -> int:
    """A port of this machine's loopback that nobody has, and that the system gives to nobody who asks for any: Ray's
    processes do so, in the seconds until the front door binds it."""
    try:
        end = int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        end = 0  # this system does not say which it gives
    ports = [random.randrange(LEAST_PORT, end) for _ in range(MOST_TRIES)] if end > LEAST_PORT else []
    for port in (*ports, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise OwnClusterError("no port of 127.0.0.1 is free")


def without_guests(model: str, folder: Path) -> str:
    """MODEL|MANIFEST, of which a manifest has no API keys and no certificate: those are for others, and nobody else
    asks this cluster. What is changed is written to `folder`. Raises ManifestError."""
    if not model.endswith((".yaml", ".yml")):
        return model
    manifest = load_manifest(Path(model))
    if manifest.http.keys is None and manifest.http.tls is None:
        return model
    data = manifest.model_dump(mode="json", exclude_unset=True)
    data["http"] |= {"keys": None, "tls": None}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(folder / "manifest.yaml")


class OwnClusterError(IsothermError, RuntimeError):
    """The cluster did not start; the message has what it said."""


class OwnCluster:
    """Context manager: up when entered, gone when left. `arguments` are those of `isotherm serve`, MODEL first; the
    port is a free one of this machine's loopback. Raises OwnClusterError."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    def __enter__(self) -> OwnCluster:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port)]
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._folder = tempfile.TemporaryDirectory(prefix="isotherm-own-")
        model, *rest = self._arguments
        served = [without_guests(model, Path(self._folder.name)), *rest]
        command = [sys.executable, "-c", COMMAND.format(parent=os.getpid()), "serve", *served, *where]
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
        self._folder.cleanup()

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
