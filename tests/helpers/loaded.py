"""Streams that go on while something is done to the cluster, and what they must have been."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from served import Served
from streams import Stream, Workload


def under_load(served: Served, work: Workload, act: Callable[[], None], silence: float = 200) -> list[Stream]:
    """The streams of as many rounds as it takes until `act`, begun in the first, is done. `silence`: as in
    `Workload.serve`."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failure.append(error)

    actor = threading.Thread(target=run)
    streams = []
    actor.start()
    while True:
        streams += asyncio.run(work.serve(served.url, silence))
        if not actor.is_alive():
            break
    actor.join()
    if failure:
        print(
            f"{len(streams)} streams, of them failed: "
            f"{Counter(s.error or s.cut for s in streams if s.error or s.cut) or 0}"
        )
        raise failure[0]
    served.remember_processes()
    return streams


def check(streams: list[Stream], expected: list[str], record_property, what: str) -> None:
    pause, first = (
        max((gap for stream in streams for gap in stream.gaps), default=0.0),
        max(stream.first for stream in streams),
    )
    record_property("longest_pause_seconds", round(pause, 3))
    record_property("longest_first_seconds", round(first, 3))
    print(f"{what}: {len(streams)} streams, longest pause between tokens {pause:.3f} s, to a first one {first:.3f} s")
    faults = Counter(s.error or s.cut for s in streams if s.error or s.cut)
    assert not faults, faults
    assert all(s.done for s in streams)
    assert [s.text for s in streams] == expected * (len(streams) // len(expected))


def kill_controller(served: Served, how: signal.Signals = signal.SIGKILL) -> dict[str, Any]:
    """Kill or stop it, wait until Ray has started it again, and give its status."""
    before = served.status()["controller"]
    os.kill(before["pid"], how)
    after = served.status()
    assert after["controller"]["pid"] != before["pid"] and after["controller"]["restarts"] == before["restarts"] + 1
    return after


def lose(served: Served, role: str, how: signal.Signals, count: int = 1) -> None:
    """Send so many workers at once a signal that ends or stops them, and wait until they have been replaced."""
    victims = [w for w in served.status()["workers"] if w["role"] == role and w["state"] == "loaded"][:count]
    assert len(victims) == count
    for victim in victims:
        os.kill(victim["pid"], how)
    deadline = time.monotonic() + 60
    while True:
        workers = served.status()["workers"]
        left = {w["id"] for w in workers} & {w["id"] for w in victims}
        if not left and all(w["state"] == "loaded" for w in workers):
            return
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)
