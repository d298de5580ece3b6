"""The hosts that the tests of networks make are joined, and parted, as they say."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from hosts import Host, Hosts, unavailable_reason

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"no hosts: {unavailable_reason()}"),
]
MEGABYTE = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def hosts():
    with Hosts(3) as hosts:
        yield hosts


def trip(source: Host, target: Host, limit: float = 5.0) -> float:
    """Seconds that a datagram takes there and back. Raises TimeoutError."""
    with target.entered():
        answering = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with source.entered():
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with answering, asking:
        answering.bind((target.address, 0))
        answering.settimeout(limit)
        asking.settimeout(limit)
        begin = time.monotonic()
        asking.sendto(b"there", answering.getsockname())
        _, who = answering.recvfrom(100)
        answering.sendto(b"back", who)
        asking.recv(100)
        return time.monotonic() - begin


def settled(source: Host, target: Host, within: float = 5.0) -> float:
    """As `trip`, of the first datagram that comes through: those sent while a link comes up may be lost."""
    deadline = time.monotonic() + within
    while True:
        try:
            return trip(source, target, 0.5)
        except OSError:
            if time.monotonic() > deadline:
                raise


def test_hosts_reach_one_another_and_nobody_else(hosts):
    one, two, three = hosts.hosts
    assert max(settled(one, two), settled(two, one), settled(two, three)) < 1
    with one.entered(), pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    inside = []
    with one.entered():
        thread = threading.Thread(target=lambda: inside.append(os.stat("/proc/thread-self/ns/net").st_ino))
        thread.start()
        thread.join()
    assert inside == [os.stat(f"/proc/{one.pid}/ns/net").st_ino] != [os.stat("/proc/self/ns/net").st_ino]


def test_an_unplugged_host_reaches_nobody_until_it_is_plugged_in(hosts):
    one, two, _ = hosts.hosts
    hosts.unplug(two)
    for source, target in (one, two), (two, one):
        with pytest.raises(OSError, match="timed out|unreachable"):
            trip(source, target, 0.3)
    hosts.plug(two)
    assert settled(one, two) < 1 and settled(two, one) < 1


def test_a_blackhole_takes_one_direction_between_two_hosts(hosts):
    one, two, three = hosts.hosts
    hosts.blackhole(one, two)
    with one.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with two.entered():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender, receiver:
        sender.bind((one.address, 0))
        receiver.bind((two.address, 0))
        for end in (sender, receiver):
            end.settimeout(0.3)
        sender.sendto(b"lost", receiver.getsockname())
        with pytest.raises(TimeoutError):
            receiver.recv(100)
        receiver.sendto(b"comes", sender.getsockname())
        assert sender.recv(100) == b"comes"
    assert trip(one, three) < 1
    hosts.heal(one, two)
    assert trip(one, two) < 1


def test_a_bad_line_delays_and_loses_and_tcp_gets_everything_through(hosts):
    one, two, _ = hosts.hosts
    with hosts.bad_line(two, 0.05, 0.0):
        assert 0.1 <= trip(one, two) < 0.5
    with hosts.bad_line(two, 0.0, 0.3):
        lost = 0
        for _ in range(60):
            try:
                trip(one, two, 0.1)
            except TimeoutError:
                lost += 1
        assert 15 < lost < 50  # of the way there, of the way back, and of the question for the hardware address
    with hosts.bad_line(two, 0.02, 0.05):
        begin = time.monotonic()
        assert received(one, two) == MEGABYTE
        print(f"a megabyte in {time.monotonic() - begin:.1f} s")
    assert trip(one, two) < 0.05


def received(source: Host, target: Host) -> bytes:
    with target.entered():
        listener = socket.create_server((target.address, 0))
    with source.entered():
        sender = socket.create_connection(listener.getsockname(), timeout=20)

    def send() -> None:
        with sender:
            sender.sendall(MEGABYTE)

    thread = threading.Thread(target=send)
    thread.start()
    with listener, listener.accept()[0] as receiver:
        receiver.settimeout(20)
        parts = []
        while part := receiver.recv(1 << 16):
            parts.append(part)
    thread.join()
    return b"".join(parts)


def test_nothing_stays():
    with Hosts(2) as hosts:
        pids = [namespace.pid for namespace in (hosts.switch, *hosts.hosts)]
        folder = hosts.folder
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids) and not os.path.exists(folder)
