"""Processes below this one: adopted when their parents die, and ended by pid. Knows nothing about Ray."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
PAUSE = 0.05  # seconds between two looks


def adopt_orphans() -> bool:
    """From now on a process below this one whose parent dies becomes this one's child instead of init's, so that it is
    still found. False where the system has no such thing (it is Linux's)."""
    if not sys.platform.startswith("linux"):
        return False
    status: int = ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return status == 0


def end_with_parent(parent: int) -> None:
    """From now on this process gets SIGTERM when its parent, which has this pid, is gone. Where the system has no such
    thing (it is Linux's) the parent has to end it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # before it was asked for
        raise SystemExit(1)


def reap() -> dict[int, int]:
    """Exit statuses, by pid, of the children that have ended since the last call; of one ended by a signal, minus its
    number."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def runs(process: psutil.Process) -> bool:
    """Whether it is still there and not a zombie; a process that has taken its pid since does not count."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def runs_as(pid: int) -> bool:
    """Whether a process with this pid runs; one that has ended, and waits for its parent to ask how, does not."""
    try:
        return runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def below(pid: int, ended: bool = False) -> list[psutil.Process]:
    """Every process below this one that runs: children, their children, and so on. With `ended`, those too that have
    ended and were not asked how (`reap`)."""
    try:
        return [process for process in psutil.Process(pid).children(recursive=True) if ended or runs(process)]
    except psutil.NoSuchProcess:
        return []


def titled(parent: int, titles: Collection[str]) -> dict[str, psutil.Process]:
    """Children of `parent` whose command line begins with one of `titles`."""
    found: dict[str, psutil.Process] = {}
    for process in below(parent):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            found |= {title: process for title in titles if line.startswith(title)}
    return found


def end_all_below(pid: int, patience: float, limit: float) -> tuple[list[str], dict[int, int]]:
    """Wait `patience` seconds for every process below `pid` to end, then kill what is left, and what it still starts.
    Gives the names of those that are there after `limit` seconds more (a process in the midst of a call to the system
    cannot be killed), and what `reap` gave meanwhile."""
    begin, empty = time.monotonic(), 0
    statuses: dict[int, int] = {}
    # One look is not enough to see that nothing is left: a process whose parent dies while the table is being read has,
    # in what was read, a parent that is not there.
    while empty < 2 and (waited := time.monotonic() - begin) <= patience + limit:
        left = below(pid, ended=True)
        empty = 0 if left else empty + 1
        if waited >= patience:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
        time.sleep(PAUSE)
        statuses |= reap()
    left = below(pid)
    return [_named(process) for process in left], statuses | reap()


def _named(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.name()})"
    except psutil.Error:
        return str(process.pid)
