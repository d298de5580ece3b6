"""Several hosts on one machine: network namespaces that a switch joins, each with a Ray node of its own if wanted.
Needs root on Linux, and `ip`.

A namespace has no name: it lasts as long as the process that was started in it, which ends with this one, however that
ends. Nothing outside of these namespaces is touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from isotherm.cluster.on_ray.environment import LOCAL_RAY, LOOPBACK
from isotherm.cluster.on_ray.token_file import keep_token

RELAY = Path(__file__).with_name("relay.py")
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379  # of Ray's head, in a namespace of its own
NOWHERE = "02:00:00:00:00:00"  # a hardware address that nobody has
CLONE_NEWNET = 0x40000000
OBJECT_STORE_BYTES = 100 << 20
START_SECONDS = 120.0
# A downed link is noticed in 3 to 5 s instead of 30; what is lost now and then on the way is not taken for one, and a
# node that was taken for dead soon hears of it. No worker is started before it is asked for: that is several seconds of
# computing for each node.
SETTINGS = {
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_liveness_self_check_interval_ms": "1000",
}

_libc = ctypes.CDLL(None, use_errno=True)


def unavailable_reason() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "the commands ip (iproute2) and unshare (util-linux) are needed"
    make = "ip link add one type veth peer name other && ip link add joined type bridge"
    tried = subprocess.run(["unshare", "--net", "sh", "-c", make], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no network namespace can be made: {tried.stderr.strip()}"


class Namespace:
    """Context manager: a network namespace, and at the end nothing that runs in it."""

    def __enter__(self) -> Namespace:
        # `cat` ends when the other end of the pipe is closed, be it by the death of this process.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.pid, own = self._holder.pid, os.stat("/proc/self/ns/net").st_ino
        while os.stat(f"/proc/{self.pid}/ns/net").st_ino == own:
            time.sleep(0.005)
        self._inode = os.stat(f"/proc/{self.pid}/ns/net").st_ino
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._holder.communicate()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in it, and so are the threads and processes that it starts."""
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self.pid}/ns/net") as inside:
            _set_namespace(inside.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def ip(self, *arguments: str) -> None:
        with self.entered():
            done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def processes(self) -> list[psutil.Process]:
        """Those in it, but for its holder and threads of this process."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.NoSuchProcess):
                here = os.stat(f"/proc/{process.pid}/ns/net").st_ino == self._inode
                if here and process.pid not in (self.pid, os.getpid()):
                    found.append(process)
        return found

    def kill_all(self) -> None:
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


class Host(Namespace):
    """One host with one interface, eth0."""

    def __init__(self, number: int):
        self.number, self.address = number, f"10.78.0.{number + 1}"
        self.ray: subprocess.Popen | None = None

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.ray is not None:
            self.ray.wait()

    def titles(self) -> list[str]:
        """Of the processes that run Isotherm's workers."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline()).strip()
                if title.startswith(("ray::AttentionShard", "ray::ExpertGroup")):
                    found.append(title)
        return found

    def raylet(self) -> psutil.Process:
        return next(p for p in self.processes() if p.name() == "raylet")


class Hosts:
    """Context manager: hosts in one network, 10.78.0.0/24, which exists in their namespaces only; the first runs the
    head of Ray, without CPUs."""

    def __init__(self, count: int):
        self.hosts = [Host(number) for number in range(count)]
        self.switch = Namespace()
        self._relays: dict[Host, subprocess.Popen] = {}

    def __enter__(self) -> Hosts:
        with ExitStack() as stack:
            # Short: Unix sockets allow 107 characters.
            self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True))
            stack.enter_context(self.switch)
            self.switch.ip("link", "add", "bridge", "type", "bridge")
            self.switch.ip("link", "set", "bridge", "up")
            for host in self.hosts:
                stack.enter_context(host)
                self._plug_in(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def address(self) -> str:
        """Of Ray."""
        return f"{self.head.address}:{PORT}"

    def _plug_in(self, host: Host) -> None:
        host.ip("link", "set", "lo", "up")
        port = f"port{host.number}"
        host.ip("link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", str(self.switch.pid))
        host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        self.switch.ip("link", "set", port, "master", "bridge")
        self.switch.ip("link", "set", port, "up")

    # --- faults of the network --------------------------------------------------------------------

    def unplug(self, host: Host) -> None:
        self.switch.ip("link", "set", f"port{host.number}", "down")

    def plug(self, host: Host) -> None:
        self.switch.ip("link", "set", f"port{host.number}", "up")

    def blackhole(self, source: Host, target: Host) -> None:
        """What one sends to the other is lost without a word, in this direction alone."""
        source.ip("neighbor", "replace", target.address, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")

    def heal(self, source: Host, target: Host) -> None:
        source.ip("neighbor", "delete", target.address, "dev", "eth0")

    @contextmanager
    def bad_line(self, host: Host, delay: float, loss: float) -> Iterator[None]:
        """Inside the block every packet to and from a host takes `delay` seconds longer, and a fraction of them,
        `loss`, is lost."""
        port, near, far = f"port{host.number}", f"near{host.number}", f"far{host.number}"
        self.switch.ip("link", "add", near, "type", "veth", "peer", "name", far)
        for end in (near, far):
            self.switch.ip("link", "set", end, "up")
        host.ip("link", "set", "eth0", "gso_max_segs", "1")  # packets as they would be on a wire, each lost by itself
        with self.switch.entered():
            relay = subprocess.Popen(
                [sys.executable, str(RELAY), port, far, str(delay), str(loss)], stdout=subprocess.PIPE, text=True
            )
        try:
            assert relay.stdout.readline() == "ready\n"
            self.switch.ip("link", "set", port, "nomaster")
            self.switch.ip("link", "set", near, "master", "bridge")
            yield
        finally:
            relay.kill()
            relay.communicate()
            self.switch.ip("link", "delete", near)
            self.switch.ip("link", "set", port, "master", "bridge")

    # --- Ray --------------------------------------------------------------------------------------

    def start_ray(self, host: Host, cpus: float) -> None:
        """Raises RuntimeError where the node has not come up, also when it was tried again: Ray gives it 30 s, which is
        little on a machine that others use."""
        keep_token()  # no `isotherm serve` of this user has made one yet, where this comes first
        for last in (False, False, True):
            try:
                return self._start_ray(host, cpus)
            except RuntimeError:
                self.end_ray(host)
                if last:
                    raise

    def _start_ray(self, host: Host, cpus: float) -> None:
        folder = Path(self.folder, str(host.number))
        folder.mkdir(exist_ok=True)
        role = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if host is self.head
            else [f"--address={self.address}"]
        )
        command = [
            RAY,
            "start",
            *role,
            f"--node-ip-address={host.address}",
            f"--num-cpus={cpus:g}",
            "--block",
            "--disable-usage-stats",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={folder}",
        ]
        environment = (
            {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | LOCAL_RAY | SETTINGS
        )
        for name in LOOPBACK:
            del environment[name]
        with host.entered(), open(folder / "ray.log", "a") as log:
            begin = log.tell()
            host.ray = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd="/")
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (said := (folder / "ray.log").read_text()[begin:]):
            if host.ray.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray does not start on host {host.number}: {said.strip().splitlines()[-1:]}")
            time.sleep(0.1)

    def end_ray(self, host: Host) -> None:
        """As a host does that loses its power: nobody is told. The host itself stays."""
        host.kill_all()
        if host.ray is not None:
            host.ray.wait()
