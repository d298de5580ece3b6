"""Processes and threads that stand still for a while, and a connection that is reset, under live streams: nothing waits for ever.

Each stream is complete and what it would have been alone, every new request is answered in time, and GET /ready says 200 for nobody who waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import psutil
import pytest
from faults import between, hold_thread, reset, stopped, thread_named
from loaded import check, under_load
from probes import Probes
from served import Served
from streams import Stream, Workload

ROUNDS = int(os.environ.get("ISOTHERM_CHAOS_ROUNDS", "1"))  # `make chaos` asks for more
ANSWER_SECONDS = 10.0  # in which a new request has its answer
WHOLE_SECONDS = 60.0  # in which every worker is there again, and requests are served
NOTICE_SECONDS = 3.0  # in which a link that was lost is noticed
SILENCE = 40.0  # seconds after which a stream counts as hanging for ever
WORKERS = {"attention": 1, "expert": 2}
SHARED, GROUPS = "shared-memory", "process-group"
over = pytest.mark.parametrize


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    manifest = {"attention": {"cpus": 0.2}, "experts": {"cpus": 0.1}, "links": {"kind": request.param, "timeout": 2.0},
                "liveness": {"timeout": 5.0}, "autoscaling": {"mode": "off"}}  # fmt: skip
    cluster = Served(manifest, tmp_path_factory.mktemp("pauses"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


@pytest.fixture(scope="module")
def workload() -> tuple[Workload, list[str]]:
    work = Workload(16, [300])
    return work, work.alone()


# --- who is hit ------------------------------------------------------------------------------------------------------------------------


def pid_of(served: Served, role: str) -> int:
    """Of one that serves."""
    return next(w["pid"] for w in served.status()["workers"] if w["role"] == role and w["state"] == "loaded")


def ingress_replica(served: Served) -> int:
    served.remember_processes()
    for pid, process in served._family.items():
        if process.is_running() and " ".join(process.cmdline()).startswith("ray::ServeReplica"):
            return pid
    raise ProcessLookupError("there is no ingress replica")


def whole(served: Served) -> bool:
    """Whether it has all its workers, and says that it is ready."""
    status = served.status()
    loaded = [w["role"] for w in status["workers"] if w["state"] == "loaded"]
    return len(status["workers"]) == len(loaded) and {r: loaded.count(r) for r in WORKERS} == WORKERS


class Fault:
    """One fault, from `begin` to `end` (of time.monotonic)."""

    begin = end = 0.0

    @contextmanager
    def timed(self):
        self.begin = time.monotonic()
        try:
            yield
        finally:
            self.end = time.monotonic()


def suffer(served: Served, workload: tuple[Workload, list[str]], what: str, fault: Callable[[], AbstractContextManager[None]],
           seconds: float, judge: Callable[[Probes, Fault], None] | None = None) -> list[Stream]:  # fmt: skip
    """`fault`, `ROUNDS` times, for so many seconds, under streams and probes. Gives the streams."""

    def act() -> None:
        for i in range(ROUNDS):
            time.sleep(1.0)
            hit = Fault()
            with Probes(served.url) as probes:
                time.sleep(0.5)
                with hit.timed(), fault():
                    time.sleep(seconds)
                time.sleep(NOTICE_SECONDS)
                recovered(served, hit)
            tell(f"{what} [{i}]", probes, hit)
            (judge or every_request_is_answered)(probes, hit)

    return under_load(served, workload[0], act, SILENCE)


def recovered(served: Served, hit: Fault) -> None:
    """Return when the cluster is whole again after a fault that is over."""
    while not whole(served):
        assert time.monotonic() < hit.end + WHOLE_SECONDS, served.status()
        time.sleep(0.2)


def tell(what: str, probes: Probes, hit: Fault) -> None:
    print(f"{what}: new requests waited {probes.waited():.1f} s at most ({probes.waited(hit.end):.1f} s after the fault's end), "
          f"{probes.waited_though_ready():.1f} s after a 200 of /ready; {len(probes.refused())} of {len(probes.requests)} were not served, the last "
          f"{probes.served_again(hit.begin):.1f} s after the fault; not ready for {probes.not_ready_seconds():.1f} s; "
          f"whole again {time.monotonic() - hit.end:.1f} s after its end")  # fmt: skip


def every_request_is_answered(probes: Probes, hit: Fault) -> None:
    """Within the time, refused at most until the time is over, and never made to wait longer by a /ready that says 200."""
    assert probes.waited() < ANSWER_SECONDS
    assert probes.served_again(hit.begin) < ANSWER_SECONDS, probes.refused()
    assert {probe.status for probe in probes.refused()} <= {503}, probes.refused()
    assert probes.waited_though_ready() < ANSWER_SECONDS


# --- the faults ------------------------------------------------------------------------------------------------------------------------


@over("served", [SHARED], indirect=True)
def test_an_ingress_replica_is_stopped(served, workload, record_property):
    """The only one: nobody else could answer meanwhile, unless Serve starts another. If it does, streams of the first end with an error event."""

    def judge(probes: Probes, hit: Fault) -> None:
        assert probes.waited(hit.end) < ANSWER_SECONDS
        assert [p for p in probes.refused() if p.begin > hit.end + ANSWER_SECONDS] == []
        assert probes.waited_though_ready() < ANSWER_SECONDS

    replica = ingress_replica(served)
    streams = suffer(served, workload, "ingress replica stopped for 20 s", lambda: stopped(ingress_replica(served)), 20.0, judge)
    if ingress_replica(served) == replica:
        check(streams, workload[1], record_property, "ingress replica stopped for 20 s")
        return
    assert [s.cut for s in streams if s.cut] == []
    for stream, expected in zip(streams, workload[1] * (len(streams) // len(workload[1])), strict=True):
        assert (stream.error and expected.startswith(stream.text)) or (stream.done and stream.text == expected)


@over("seconds", [3.0, 6.0])
@over("served", [SHARED, GROUPS], indirect=True)
def test_an_expert_group_is_stopped(served, workload, record_property, seconds):
    what = f"expert group stopped for {seconds:g} s"
    streams = suffer(served, workload, what, lambda: stopped(pid_of(served, "expert")), seconds)
    check(streams, workload[1], record_property, what)


@over("served", [GROUPS], indirect=True)
def test_a_data_connection_is_reset(served, workload, record_property):
    @contextmanager
    def fault():
        shard, group = pid_of(served, "attention"), pid_of(served, "expert")
        joined = between(shard, group)
        assert joined, "a shard and a group have a link, so a connection"
        reset(shard, joined[0])
        yield

    check(suffer(served, workload, "data connection reset", fault, 0.0), workload[1], record_property, "data connection reset")


@contextmanager
def held(pid: int, thread: str, seconds: float):
    """Held until the block's end, which comes after so many seconds."""
    holder = threading.Thread(target=hold_thread, args=(thread_named(pid, thread), seconds))
    holder.start()
    try:
        yield
    finally:
        holder.join()
        print(f"process {pid} {'was killed' if not psutil.pid_exists(pid) else 'lives on'}")


@over("role, thread", [("attention", "step loop"), ("expert", None)], ids=["step thread", "loop thread"])
@over("served", [SHARED, GROUPS], indirect=True)
def test_a_working_thread_is_held(served, workload, record_property, role, thread, request):
    thread = thread or {SHARED: "expert loop", GROUPS: "experts"}[request.node.callspec.params["served"]]
    what = f"thread {thread!r} held for 30 s"
    streams = suffer(served, workload, what, lambda: held(pid_of(served, role), thread, 30.0), 30.0)
    check(streams, workload[1], record_property, what)
