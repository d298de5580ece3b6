"""The faults that the tests of pauses and partitions do are what they are called."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from faults import between, hold_thread, reset, stopped, thread_named

from isotherm.cluster.background import spawn_thread

COUNTING = """
import sys, threading, time
from isotherm.cluster.background import spawn_thread

counts = {"held": 0, "free": 0}

def count(name):
    while True:
        counts[name] += 1
        time.sleep(0.001)

for name in counts:
    spawn_thread(f"count {name}", lambda name=name: count(name))
while not all(counts.values()):  # until both have their name
    time.sleep(0.001)
for _ in sys.stdin:
    print(counts["held"], counts["free"], flush=True)
"""
MAY_TRACE = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="holds threads by ptrace")


class Counting:
    """A process with two threads that count."""

    def __enter__(self) -> Counting:
        self._process = subprocess.Popen(
            [sys.executable, "-c", COUNTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self.counts()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def counts(self) -> tuple[int, int]:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        held, free = self._process.stdout.readline().split()
        return int(held), int(free)


@MAY_TRACE
def test_a_held_thread_stands_still_and_goes_on_afterwards_and_the_others_do_not_notice():
    with Counting() as process:
        holder = threading.Thread(target=hold_thread, args=(thread_named(process.pid, "count held"), 0.8))
        holder.start()
        time.sleep(0.2)
        before = process.counts()
        time.sleep(0.3)
        during = process.counts()
        holder.join()
        time.sleep(0.2)
        after = process.counts()
    assert before[0] == during[0] < after[0]
    assert before[1] < during[1] < after[1]


@MAY_TRACE
def test_a_process_can_be_killed_while_a_thread_of_it_is_held():
    with Counting() as process:
        threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
        assert 0.2 < hold_thread(thread_named(process.pid, "count held"), 20) < 5
        assert process._process.wait(5) == -signal.SIGKILL


def test_a_stopped_process_stands_still_and_goes_on_afterwards():
    with Counting() as process:
        with stopped(process.pid):
            assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        before = process.counts()
        time.sleep(0.1)
        assert before < process.counts()


def test_there_must_be_one_thread_of_a_name():
    with pytest.raises(ProcessLookupError, match="0 threads called 'nobody'"):
        thread_named(os.getpid(), "nobody")
    release = threading.Event()
    threads = [spawn_thread("a name of more than fifteen bytes", release.wait) for _ in range(2)]
    said, deadline = "", time.monotonic() + 10
    try:
        while "2 threads" not in said:  # until both have their name
            assert time.monotonic() < deadline, said
            try:
                thread_named(os.getpid(), "a name of more than fifteen bytes")
            except ProcessLookupError as error:
                said = str(error)
    finally:
        release.set()
        for thread in threads:
            thread.join()


PEER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as joined:
    try:
        joined.recv(1)
        print("closed")
    except ConnectionError:
        print("failed")
"""


def test_a_reset_connection_fails_at_both_ends():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER, str(listener.getsockname()[1])], stdout=subprocess.PIPE, text=True
        )
        own, _ = listener.accept()
        with own:
            (connection,) = between(peer.pid, os.getpid())
            assert len(between(os.getpid(), peer.pid)) == 1
            reset(peer.pid, connection)
            with pytest.raises(ConnectionResetError):
                own.recv(1)
            assert peer.communicate(timeout=10)[0].strip() == "failed"
