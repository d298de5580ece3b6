"""How many CPUs this process may keep busy: those that it may run on, or fewer where a control group gives it less time
than they have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Threads beyond these would be stopped in mid-step, and the others would wait for them."""
    quota = cpu_quota()
    return allowed_cpus() if quota is None else min(allowed_cpus(), max(1, int(quota)))


def allowed_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(own: Path = OWN_GROUPS, root: Path = GROUPS) -> float | None:
    """The least that the control group of this process or any above it allows, in CPUs' worth of time; None: all of
    them."""
    return min(filter(None, map(_quota, control_groups("cpu", own, root))), default=None)


def _quota(folder: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # of version 2, and of version 1
        try:
            given, period = " ".join((folder / name).read_text() for name in files).split()
            if int(given) > 0:
                return int(given) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # not there; "max"
            continue
    return None


def control_groups(controller: str, own: Path = OWN_GROUPS, root: Path = GROUPS) -> Iterator[Path]:
    """The folders of this process's control group and of all above it, in version 2 and in version 1's hierarchy for
    `controller`. In a container what is seen may begin at the container's own, which then is the root."""
    yield from (root, root / controller)
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers or controller in controllers.split(","):
            base, within = (root / controller if controllers else root), Path(path.lstrip("/"))
            yield from (base / part for part in (within, *within.parents))
