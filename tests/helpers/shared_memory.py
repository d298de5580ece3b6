"""Memory that processes share, by whose it is: others may make and remove files in /dev/shm while a test runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

FOLDER = "/dev/shm/"


def _mentioned(pid: int | str, prefix: str) -> list[str]:
    """What a process has open or mapped whose name begins with `prefix`, a file descriptor or mapping each; nothing
    of a process that is gone."""
    names = []
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                names.append(str(link.readlink()))
    with suppress(OSError):
        # The path is the sixth field, and may have spaces.
        names += [
            fields[5]
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            if len(fields := line.split(None, 5)) == 6
        ]
    return [name.removesuffix(" (deleted)") for name in names if name.startswith(prefix)]


def segments(pid: int | str = "self") -> list[str]:
    """Segments and bells of links that a process holds. They are anonymous files (memfd), which no folder shows."""
    return sorted(_mentioned(pid, "/memfd:isotherm"))


def files(processes: Iterable[psutil.Process]) -> set[str]:
    """Files in /dev/shm that these processes have open or mapped: those are theirs. Of one that is gone, none: its pid
    may be another's by now."""
    return {name for process in processes if process.is_running() for name in _mentioned(process.pid, FOLDER)}


def still_there(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if Path(name).exists())
