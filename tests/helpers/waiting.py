"""Waiting for what happens in another thread or process, which a busy machine may do late."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 20.0) -> float:
    """How many seconds it took until `condition` held. Fails where it does not in `seconds`."""
    begin = time.perf_counter()
    while not condition():
        assert time.perf_counter() < begin + seconds, "did not happen in time"
        time.sleep(0.001)
    return time.perf_counter() - begin
