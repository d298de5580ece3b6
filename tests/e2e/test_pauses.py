"""Processes and threads that stand still for a while, and a connection that is reset, under live streams: nothing
waits for ever.

Each stream is complete and what it would have been alone, every new request is answered in time, and GET /ready says
200 for nobody who waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, suppress

import psutil
import pytest
from disturbed import HELD_SECONDS, Seen, disturb
from faults import between, hold_thread, reset, stopped, thread_named
from loaded import check
from served import Served
from streams import Stream, Workload

pytestmark = pytest.mark.chaos
ANSWER_SECONDS = 10.0  # in which a new request has its answer
READY_SECONDS = 2.0  # in which GET /ready has noticed that requests hang
WORKERS = {"attention": 1, "expert": 2}
SHARED, GROUPS = "shared-memory", "process-group"
Fault = Callable[[], AbstractContextManager[None]]
over = pytest.mark.parametrize


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    manifest = {
        "attention": {"cpus": 0.2},
        "experts": {"cpus": 0.1},
        "links": {"kind": request.param, "timeout": 2.0},
        "liveness": {"timeout": 5.0, "spare_processes": True},
        "autoscaling": {"mode": "off"},
    }
    cluster = Served(manifest, tmp_path_factory.mktemp("pauses"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


@pytest.fixture(scope="module")
def workload() -> tuple[Workload, list[str]]:
    work = Workload(16, [300])
    return work, work.alone()


# --- who is hit -----------------------------------------------------------------------------------


def pid_of(served: Served, role: str) -> int:
    """Of one that serves."""
    return next(w["pid"] for w in served.status()["workers"] if w["role"] == role and w["state"] == "loaded")


def ingress_replica(served: Served) -> int:
    served.remember_processes()
    for pid, process in served._family.items():
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                return pid
    raise ProcessLookupError("there is no ingress replica")


def suffer(served: Served, work: Workload, what: str, fault: Fault, seconds: float) -> list[Stream]:
    return disturb(served, work, what, fault, seconds, every_request_is_answered, WORKERS)


def every_request_is_answered(seen: Seen) -> None:
    """Within the time, refused at most until the time is over, and never made to wait longer by a /ready that says
    200."""
    probes = seen.probes
    assert probes.waited() < ANSWER_SECONDS
    assert probes.served_again(seen.begin) < ANSWER_SECONDS, probes.refused()
    assert {probe.status for probe in probes.refused()} <= {503}, probes.refused()
    assert probes.hung_though_ready() < READY_SECONDS


# --- the faults -----------------------------------------------------------------------------------


@over("served", [SHARED], indirect=True)
def test_an_ingress_replica_is_stopped(served, workload):
    """The only one: nobody else could answer meanwhile, so another takes its place. Streams of the first that had begun
    end with an error event; requests that had not are served by the other, or refused."""
    before: list[int] = []

    @contextmanager
    def fault():
        before.append(ingress_replica(served))
        with stopped(before[-1]):
            yield

    streams = suffer(served, workload[0], "ingress replica stopped", fault, 20.0)
    assert ingress_replica(served) not in before
    assert [pid for pid in before if psutil.pid_exists(pid)] == []
    told = served.log.read_text()
    assert [pid for pid in before if f" (process {pid}) is lost: it hung, and was killed; Ray Serve" not in told] == []
    assert [pid for pid in before if f" was started in the place of process {pid}\n" not in told] == []
    assert [s.cut for s in streams if s.cut] == []
    for stream, expected in zip(streams, workload[1] * (len(streams) // len(workload[1])), strict=True):
        assert (stream.error and expected.startswith(stream.text)) or (stream.done and stream.text == expected)


@over("seconds", [3.0, 6.0])
@over("served", [SHARED, GROUPS], indirect=True)
def test_an_expert_group_is_stopped(served, workload, record_property, seconds):
    what = f"expert group stopped for {seconds:g} s"
    streams = suffer(served, workload[0], what, lambda: stopped(pid_of(served, "expert")), seconds)
    check(streams, workload[1], record_property, what)


@over("by", ["attention", "expert"])
@over("served", [GROUPS], indirect=True)
def test_a_data_connection_is_reset(served, workload, record_property, by):
    """The other one is sent a reset; who resets it is told nothing by the system, and finds its peer silent."""

    @contextmanager
    def fault():
        pid, other = pid_of(served, by), pid_of(served, {"attention": "expert", "expert": "attention"}[by])
        joined = between(pid, other)
        assert joined, "a shard and a group have a link, so a connection"
        reset(pid, joined[0])
        yield

    what = f"data connection reset at the {by} worker's end"
    check(suffer(served, workload[0], what, fault, 0.0), workload[1], record_property, what)


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
    what = f"thread {thread!r} held for {HELD_SECONDS:g} s"
    streams = suffer(served, workload[0], what, lambda: held(pid_of(served, role), thread, HELD_SECONDS), HELD_SECONDS)
    check(streams, workload[1], record_property, what)
