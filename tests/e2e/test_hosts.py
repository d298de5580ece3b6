"""A cluster over several hosts, in network namespaces, whose network and nodes fail under live streams: none is
altered, and none is lost where there is a copy or a spare place. Links between hosts are gloo's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from disturbed import HELD_SECONDS, Seen, disturb
from faults import between, reset
from hosts import Host, Hosts, unavailable_reason
from loaded import check
from served import Served
from streams import Workload

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"no hosts can be made: {unavailable_reason()}"),
]
WHOLE_SECONDS = 15.0  # from a fault's end until everything is as before
# Until a node that was taken for dead has heard of it, for which its connections may pause as long as they were dead,
# and has ended.
ENDS_SECONDS = 45.0
READY_SECONDS = 2.0  # in which GET /ready has noticed that requests hang
WORKERS = {"attention": 1, "expert": 2}


@pytest.fixture(scope="module")
def hosts():
    """A head, three hosts with room for one worker each, and one to spare."""
    with Hosts(5) as hosts:
        hosts.start_ray(hosts.head, 0)
        for host in hosts.hosts[1:]:
            hosts.start_ray(host, 1)
        yield hosts


@pytest.fixture(scope="module")
def served(hosts, tmp_path_factory):
    manifest = {
        "attention": {"cpus": 1},
        "experts": {"cpus": 1},
        "links": {"timeout": 4.0},
        "liveness": {"timeout": 5.0, "spare_processes": True},
        "autoscaling": {"mode": "off"},
    }
    with (
        hosts.head.entered(),
        Served(manifest, tmp_path_factory.mktemp("hosts"), "--address", hosts.address) as cluster,
    ):
        cluster.ray_folders = [Path(hosts.folder, str(host.number)) for host in hosts.hosts]
        yield cluster


@pytest.fixture(scope="module")
def workload() -> tuple[Workload, list[str]]:
    work = Workload(8, [120])
    return work, work.alone()


def host_of(hosts: Hosts, served: Served, role: str) -> Host:
    """Where a worker of this role runs."""
    status = served.status()
    node = next(w["node"] for w in status["workers"] if w["role"] == role)
    address = next(n["address"] for n in status["nodes"] if n["id"] == node)
    return next(host for host in hosts.hosts if host.address == address)


def nodes(served: Served) -> set[str]:
    return {n["id"] for n in served.status()["nodes"] if n["alive"]}


def suffer(
    served: Served,
    workload: tuple[Workload, list[str]],
    record_property,
    what: str,
    fault: Callable[[], AbstractContextManager[None]],
    seconds: float,
    repair: Callable[[], None] = lambda: None,
    hangs: bool = True,
) -> None:
    """`hangs`: requests do while the fault lasts, so that GET /ready has to say so."""
    judge = partial(whole_in_time, hangs=hangs)
    streams = disturb(served, workload[0], what, fault, seconds, judge, WORKERS, repair)
    check(streams, workload[1], record_property, what)


def whole_in_time(seen: Seen, hangs: bool) -> None:
    assert seen.whole < seen.end + WHOLE_SECONDS
    probes = seen.probes
    assert probes.waited(seen.end) < WHOLE_SECONDS
    assert [p for p in probes.refused() if p.begin > seen.end + WHOLE_SECONDS] == []
    assert {p.status for p in probes.refused()} <= {503}, probes.refused()
    assert not hangs or probes.hung_though_ready() < READY_SECONDS


def test_each_worker_has_a_host_of_its_own(hosts, served, workload, record_property):
    status = served.status()
    assert len({w["node"] for w in status["workers"]}) == 3 and len(status["nodes"]) == 5
    links = [kind for w in status["workers"] if w["role"] == "expert" for kind in w["links"].values()]
    assert links == ["process-group (gloo)"] * 2
    check(asyncio.run(workload[0].serve(served.url)), workload[1], record_property, "undisturbed")


@pytest.mark.parametrize("by", ["the group", "the shard"])
def test_data_connections_are_reset(hosts, served, workload, record_property, by):
    @contextmanager
    def fault():
        pids = {role: [w["pid"] for w in served.status()["workers"] if w["role"] == role] for role in WORKERS}
        (shard,) = pids["attention"]
        for group in pids["expert"]:
            ends = (group, shard) if by == "the group" else (shard, group)
            joined = between(*ends)
            assert joined, "a shard and a group have a link, so a connection"
            for connection in joined:
                reset(ends[0], connection)
        yield

    suffer(served, workload, record_property, f"both data connections reset by {by}", fault, 0.0)


def test_a_bad_line_evicts_nobody(hosts, served, record_property):
    """200 ms there and back, and 5 % of all packets lost, on the line of a host with a group. Requests take seconds a
    layer, and get on: GET /ready may say 200 all the time."""
    work = Workload(8, [8])
    before, begin = {w["id"]: w["pid"] for w in served.status()["workers"]}, time.time()
    suffer(
        served,
        (work, work.alone()),
        record_property,
        "200 ms and 5 % loss",
        lambda: hosts.bad_line(host_of(hosts, served, "expert"), 0.1, 0.05),
        HELD_SECONDS,
        hangs=False,
    )
    after = {w["id"]: w["pid"] for w in served.status()["workers"]}
    assert after == before, "\n".join(served.logged(begin))


@pytest.mark.parametrize("direction", ["to the group", "from the group"])
def test_a_one_way_blackhole(hosts, served, workload, record_property, direction):
    """Between the hosts of the shard and of a group; Ray's head reaches both."""

    @contextmanager
    def fault():
        ends = [host_of(hosts, served, "attention"), host_of(hosts, served, "expert")]
        if direction == "from the group":
            ends.reverse()
        hosts.blackhole(*ends)
        try:
            yield
        finally:
            hosts.heal(*ends)

    suffer(served, workload, record_property, f"one-way blackhole, {direction}", fault, 20.0)


class Lost:
    """The host that a fault took, and the nodes that Ray had before."""

    def __init__(self, hosts: Hosts, served: Served):
        self._hosts, self._served = hosts, served

    def choose(self, role: str) -> Host:
        self.host, self._before = host_of(self._hosts, self._served, role), nodes(self._served)
        return self.host

    def come_back(self) -> None:
        """What it had before it was taken for dead has ended by itself; Ray is started again on it, as a supervisor
        would."""
        host, deadline = self.host, time.monotonic() + ENDS_SECONDS
        while host.titles() or host.ray.poll() is None:
            assert time.monotonic() < deadline, [*host.titles(), host.ray.poll()]
            time.sleep(0.1)
        print(f"the old node had ended {time.monotonic() - deadline + ENDS_SECONDS:.1f} s after the cluster was whole")
        self._hosts.end_ray(host)
        self._hosts.start_ray(host, 1)
        while len(now := nodes(self._served)) < len(self._before):
            assert time.monotonic() < deadline + 60, now
            time.sleep(0.2)
        assert len(now - self._before) == 1


@pytest.mark.parametrize("role", ["expert", "attention"])
def test_a_host_goes_down_and_comes_back_as_a_new_member(hosts, served, workload, record_property, role):
    lost = Lost(hosts, served)

    @contextmanager
    def fault():
        host = lost.choose(role)
        hosts.unplug(host)
        try:
            yield
        finally:
            hosts.plug(host)

    suffer(served, workload, record_property, f"the host of an {role} worker down", fault, 20.0, lost.come_back)


@pytest.mark.parametrize("role", ["expert", "attention"])
def test_a_raylet_is_killed(hosts, served, workload, record_property, role):
    lost = Lost(hosts, served)

    @contextmanager
    def fault():
        raylet = lost.choose(role).raylet()
        raylet.kill()
        psutil.wait_procs([raylet], timeout=5)
        yield

    suffer(served, workload, record_property, f"raylet of an {role} worker killed", fault, 0.0, lost.come_back)
