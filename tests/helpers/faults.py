"""Faults done to other processes of this machine: one thread held, a whole process stopped, one TCP connection reset.

Linux alone, and for those who may trace the process.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from waiting import until

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000  # lets waitpid wait for threads
PIDFD_GETFD = 438  # the system call's number on every architecture
ESTABLISHED = "01"
LOOK = 0.02  # seconds

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


# --- threads and processes ------------------------------------------------------------------------


def thread_named(pid: int, name: str) -> int:
    """The id of the one thread that the system knows by this name (its first 15 bytes)."""
    names = {int(task.name): (task / "comm").read_text().rstrip("\n") for task in Path(f"/proc/{pid}/task").iterdir()}
    found = [tid for tid, comm in names.items() if comm == name[:15]]
    if len(found) != 1:
        every = sorted(set(names.values()))
        raise ProcessLookupError(f"process {pid} has {len(found)} threads called {name!r}; all are {every}")
    return found[0]


def hold_thread(tid: int, seconds: float) -> float:
    """Keep one thread from running while the others of its process go on. For how long it was: less where it was
    killed.
    Raises PermissionError where this process may not trace that one."""
    _ptrace(PTRACE_SEIZE, tid)
    begin = time.monotonic()
    try:
        _ptrace(PTRACE_INTERRUPT, tid)
        os.waitpid(tid, WALL)
        while time.monotonic() < begin + seconds:
            # A process that is killed is not gone before whoever traces a thread of it has seen that thread's end.
            seen, status = os.waitpid(tid, WALL | os.WNOHANG)
            if seen and not os.WIFSTOPPED(status):
                return time.monotonic() - begin
            time.sleep(LOOK)
    finally:
        with suppress(ProcessLookupError):
            _ptrace(PTRACE_DETACH, tid)
    return time.monotonic() - begin


def _ptrace(request: int, tid: int) -> None:
    if _libc.ptrace(request, tid, None, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace({request:#x}) of thread {tid}: {os.strerror(code)}")


def stop(pid: int) -> None:
    """Until SIGCONT. Returns when every thread stands still, or has ended: the signal comes a moment late."""
    os.kill(pid, signal.SIGSTOP)
    with suppress(FileNotFoundError):  # it has been killed meanwhile
        until(lambda: not any(_moves(task) for task in Path(f"/proc/{pid}/task").iterdir()))


def _moves(task: Path) -> bool:
    """Whether a thread, by its folder, may still do something. Its state is what comes after its name, which may have
    spaces and brackets: T where it is stopped, t where it is held by ptrace, Z and X where it has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The whole process stands still inside the block; it may be killed meanwhile."""
    stop(pid)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# --- connections ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connection:
    """An established TCP connection as one process has it: addresses as the kernel prints them, and its descriptor
    there."""

    local: str
    remote: str
    descriptor: int


def connections(pid: int) -> list[Connection]:
    """Of a process in whatever network namespace."""
    descriptors = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if (target := os.readlink(entry)).startswith("socket:["):
                descriptors[target[len("socket:[") : -1]] = int(entry.name)
    found = []
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):  # of a kernel without IPv6
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, remote, state, *_ = fields = line.split()
                if state == ESTABLISHED and fields[9] in descriptors:
                    found.append(Connection(local, remote, descriptors[fields[9]]))
    return found


def between(pid: int, other: int) -> list[Connection]:
    """The connections that join two processes, as the first has them."""
    ends = {(c.remote, c.local) for c in connections(other)}
    return [c for c in connections(pid) if (c.local, c.remote) in ends]


def reset(pid: int, connection: Connection) -> None:
    """Abort a connection of another process, as `ss -K` does: its own next call fails, and its peer is sent a reset.
    Where the system cannot do that, the association is dissolved, of which only the peer learns at once."""
    addresses = [_address(connection.local), _address(connection.remote)]
    command = ["nsenter", "-t", str(pid), "-n", "ss", "-K", "-H", "-t", "-n", "src", addresses[0], "dst", addresses[1]]
    with suppress(FileNotFoundError):
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=10)
    if connection in connections(pid):
        _dissolve(pid, connection)


def _address(end: str) -> str:
    """As the kernel prints it, in 32-bit words of the machine → as `ss` takes it."""
    words, port = end.split(":")
    packed = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    text = str(address) if address.version == 4 else f"[{address}]"
    return f"{text}:{int(port, 16)}"


def _dissolve(pid: int, connection: Connection) -> None:
    watched = os.pidfd_open(pid)
    try:
        taken = _libc.syscall(PIDFD_GETFD, watched, connection.descriptor, 0)
        if taken < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{connection} of process {pid} cannot be taken: {os.strerror(code)}")
    finally:
        os.close(watched)
    try:
        # Connecting to no address dissolves the association, which TCP tells the peer by a reset; Python's own connect
        # cannot say it.
        nowhere = ctypes.create_string_buffer(socket.AF_UNSPEC.to_bytes(2, "little"), 16)
        if _libc.connect(taken, nowhere, 16) != 0 and ctypes.get_errno() != errno.ENOTCONN:
            raise OSError(ctypes.get_errno(), f"{connection} could not be reset")
    finally:
        os.close(taken)
