"""How much memory this machine, or the control group that this process is in, has and has left. Imports no Ray."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from isotherm.kernels.cpus import GROUPS, OWN_GROUPS, control_groups


def free_memory(own: Path = OWN_GROUPS, root: Path = GROUPS) -> int:
    """Bytes that new processes here could have: what the machine could give, or less where the control group that they
    are in, or one above it, says so (version 2). What the page cache would give back is free."""
    free: list[int] = [psutil.virtual_memory().available]
    for folder in control_groups("memory", own, root):
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            figures = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
            free.append(limit - used + int(figures["inactive_file"]))
        except (OSError, ValueError, KeyError):  # not there; "max"
            continue
    return max(0, min(free))


def machine_memory() -> int:
    """Bytes that processes here may use together: the machine's, or less where the control group that they are in, or
    one above it, says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there; "max"
                continue
    return min(limit for limit in limits if limit > 0)
