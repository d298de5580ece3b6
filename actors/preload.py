"""What each Python process of Isotherm's Ray imports first (RAY_preload_python_modules). One that nobody needs yet, a
spare, goes on and imports what workers are made of, which takes seconds: then the one that becomes a worker in it,
where another was lost, begins at once."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from isotherm.cluster.background import spawn_thread

SETTLED_SECONDS = 0.5  # after which the process's own start imports nothing more
IDLE_SECONDS = 3.0  # in which one that is about to become an actor imports its class


def is_idle() -> bool:
    """Whether Ray has given this process no work: it says so in the process's title. One that serves must not have its
    imports under its feet."""
    try:
        return Path("/proc/self/cmdline").read_bytes().startswith(b"ray::IDLE")
    except OSError:
        return False


def _import_when_idle() -> None:
    time.sleep(SETTLED_SECONDS)
    modules = len(sys.modules)
    time.sleep(IDLE_SECONDS)
    if len(sys.modules) != modules:
        return
    if is_idle():
        import torch  # noqa: F401
    if is_idle():
        import isotherm.actors.attention.shard
    if is_idle():
        import isotherm.actors.experts.group  # noqa: F401


spawn_thread("preload", _import_when_idle, vital=False)
