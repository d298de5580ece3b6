"""What each Python process of Isotherm's Ray imports first (RAY_preload_python_modules). One that nobody needs yet, a
spare, goes on and imports what workers are made of, which takes seconds: then the one that becomes a worker in it,
where another was lost, begins at once."""

from __future__ import annotations

import sys
import time

from isotherm.cluster.background import spawn_thread

SETTLED_SECONDS = 0.5  # after which the process's own start imports nothing more
IDLE_SECONDS = 3.0  # in which one that has something to do imports what it needs


def _import_when_idle() -> None:
    time.sleep(SETTLED_SECONDS)
    modules = len(sys.modules)
    time.sleep(IDLE_SECONDS)
    if len(sys.modules) == modules:
        import isotherm.actors.attention.shard
        import isotherm.actors.experts.group
        import isotherm.kernels.native.backend  # noqa: F401


spawn_thread("preload", _import_when_idle, vital=False)
