"""A fault done to a served cluster under streams and probes, again and again, and what must hold then."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from loaded import under_load
from probes import Probes
from served import Served
from streams import Stream, Workload

ROUNDS = int(os.environ.get("ISOTHERM_CHAOS_ROUNDS", "1"))  # `make chaos` asks for more
HELD_SECONDS = 30.0 if ROUNDS > 1 else 15.0  # of a fault that is long over for those who wait, one way or the other
LEAD_SECONDS = 1.0  # that streams and probes have before the fault
NOTICE_SECONDS = 4.0  # in which a fault is noticed, also one that is over at once
GIVE_UP_SECONDS = 60.0  # in which every worker is there again, or never
SILENCE = 60.0  # seconds after which a stream counts as hanging for ever


@dataclass
class Seen:
    """One fault: when it was, of time.monotonic; when the cluster was found whole again after it; what was asked
    meanwhile."""

    probes: Probes
    begin: float = 0.0
    end: float = 0.0
    whole: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.begin = time.monotonic()
        try:
            yield
        finally:
            self.end = time.monotonic()

    def __str__(self) -> str:
        probes, refused = self.probes, self.probes.refused()
        statuses = sorted({probe.status for probe in refused})
        return (
            f"for {self.end - self.begin:.1f} s; new requests waited {probes.waited():.1f} s at most, "
            f"{probes.waited(self.end):.1f} s of them after the fault's end, and hung for "
            f"{probes.hung_though_ready():.1f} s while /ready said 200 ({probes.hung_longest(self.begin)}); "
            f"{len(refused)} of {len(probes.requests)} were not served ({statuses}), "
            f"the last {probes.served_again(self.begin):.1f} s after it began; "
            f"/ready did not say 200 for {probes.not_ready_seconds():.1f} s; "
            f"whole {self.whole - self.end:.1f} s after its end"
        )


def disturb(
    served: Served,
    work: Workload,
    what: str,
    fault: Callable[[], AbstractContextManager[None]],
    seconds: float,
    judge: Callable[[Seen], None],
    workers: dict[str, int],
    repair: Callable[[], None] = lambda: None,
) -> list[Stream]:
    """`fault`, `ROUNDS` times, for so many seconds, each judged when the cluster has its `workers` (numbers by role)
    again; then `repair` puts right what is not Isotherm's business. Gives the streams."""

    def act() -> None:
        for i in range(ROUNDS):
            begin = time.time()
            try:
                strike(f"{what} [{i}]")
            except BaseException:
                told = [line for line in served.logged(begin) if not is_of_a_quick_request(line)]
                print(f"{what} [{i}]: what was logged:", *told, sep="\n  ", flush=True)
                raise

    def strike(name: str) -> None:
        try:
            judge(struck(name))
        finally:
            repair()

    def struck(name: str) -> Seen:
        with Probes(served.url) as probes:
            seen = Seen(probes)
            time.sleep(LEAD_SECONDS)
            with fault(), seen.timed():
                time.sleep(seconds)
            seen.whole = wait_until_whole(served, workers, seen.end + GIVE_UP_SECONDS)
            time.sleep(max(0.0, seen.begin + NOTICE_SECONDS - time.monotonic()))
            seen.whole = max(seen.whole, wait_until_whole(served, workers, seen.end + GIVE_UP_SECONDS, seen.whole))
        print(f"{name} {seen}", flush=True)
        return seen

    return under_load(served, work, act, SILENCE)


def is_of_a_quick_request(line: str) -> bool:
    """Of the log: one of hundreds, that say nothing of what went wrong."""
    took = re.search(r" isotherm\.request INFO: ended .* seconds_ms=(\S+)", line)
    return took is not None and float(took[1]) < 1500


def wait_until_whole(served: Served, workers: dict[str, int], deadline: float, whole: float = 0.0) -> float:
    """When the cluster was first seen with all its workers, loaded: `whole` where it still is at the first look."""
    while True:
        status = served.status()["workers"]
        loaded = [w["role"] for w in status if w["state"] == "loaded"]
        if len(loaded) == len(status) and {role: loaded.count(role) for role in workers} == workers:
            return whole or time.monotonic()
        assert time.monotonic() < deadline, status
        whole = 0.0
        time.sleep(0.2)
