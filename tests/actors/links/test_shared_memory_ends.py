"""How links in shared memory begin and end: a survivor notices at once whatever the other side dies of, and nothing is
left."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import mmap
import os
import random
import signal
import socket
import statistics
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from faults import stop
from link_peers import (
    Group,
    ask,
    connect,
    make_worker,
    process,
    random_message,
    random_pause,
    run_shard,
    serve_group,
)
from native_there import require_native
from shared_memory import segments
from waiting import until

from isotherm.actors.experts.native_loop import NativeLoop
from isotherm.actors.links.protocol import LinkError
from isotherm.actors.links.shared_memory import (
    SharedMemoryLink,
    accept_shard,
    join_group,
    new_bell,
    new_segment,
    segment_bytes,
)
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.native import ring
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

require_native(ring=True)

SEED = int(os.environ.get("ISOTHERM_TEST_SEED", "20261122"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32")


@pytest.fixture(scope="module")
def config(path: Path):
    return Checkpoint.open(path).config


@pytest.fixture(params=["native loop", "python server"])
def group(request: pytest.FixtureRequest, path: Path) -> Iterator[Group]:
    native = request.param == "native loop"
    made = Group(make_worker(path, native), native)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_segment_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    before = segments()
    yield
    for record in caplog.get_records("call"):
        record.exc_info = record.args = None  # the frames of an error's traceback keep their links
    gc.collect()
    until(lambda: len(segments()) <= len(before), 30.0)


# --- ends -----------------------------------------------------------------------------------------


def test_closing_tells_the_peer(group: Group, config, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        link = connect(group)
        ask(link, random_message(config, np.random.default_rng(10), 2))
        link.close()
        link.close()
        link.in_step(True)
        until(lambda: not group.server.links())
    with pytest.raises(LinkError, match="this link was closed"):
        link.send(random_message(config, np.random.default_rng(10), 2))
    until(lambda: "link to shard closed" in caplog.text)


def test_a_group_that_closes_tells_its_shards(path: Path, config):
    group = Group(make_worker(path, True), True)
    link = connect(group)
    group.close()
    with pytest.raises(LinkError, match="the group closed the link"):
        ask(link, random_message(config, np.random.default_rng(11), 2))
    link.close()


def test_closing_from_another_thread_ends_a_wait(path: Path, config):
    """The group hangs; whoever closes the link does not wait for the link's timeout."""
    group = Group(make_worker(path, True), True)
    link = connect(group)
    with group.worker.gate:  # nothing is computed meanwhile
        link.send(random_message(config, np.random.default_rng(12), 2))
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                link.receive()
            except LinkError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        begin = time.perf_counter()
        link.close()
        waiting.join()
        assert len(errors) == 1 and time.perf_counter() - begin < 1.0
    group.close()


def open_files() -> set[str]:
    """What this process has open, by the system's names, each of one file or socket. Threads that other tests have left
    may close what is theirs at any moment, so a number says nothing."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if name.startswith(("socket:", "/memfd:")):
                found.add(f"{name} {os.stat(f'/proc/self/fd/{descriptor}').st_ino}")
    return found


def test_200_links_leave_no_descriptor_thread_or_mapping(group: Group, config):
    rng = np.random.default_rng(13)

    def one(i: int) -> None:
        link = connect(group, f"shard-{i % 3}")
        ask(link, random_message(config, rng, 2))
        link.close()
        until(lambda: f"shard-{i % 3}" not in group.server.links())

    def state() -> tuple[int, int, int]:
        return len(open_files()), threading.active_count(), Path("/proc/self/maps").read_text().count("memfd:isotherm")

    for i in range(5):
        one(i)
    before = state()
    for i in range(200):
        one(i)
    until(lambda: all(now <= then + 2 for now, then in zip(state(), before, strict=True)))


def test_a_peer_that_is_gone_already_is_seen():
    """Its death is told while the end is made: nothing that is done later may forget it."""
    library, segment, stop = ring.load(), mmap.mmap(-1, ring.HEADER_BYTES), threading.Event()
    header = ctypes.addressof(ctypes.c_char.from_buffer(segment))
    library.iso_segment_begin(header, ring.HEADER_BYTES)
    data = bytes(1 << 20)

    def keep_busy() -> None:  # without the interpreter's lock
        while not stop.is_set():
            hashlib.sha256(data)

    busy = [threading.Thread(target=keep_busy) for _ in range(len(os.sched_getaffinity(0)))]
    for thread in busy:
        thread.start()
    try:
        for i in range(5000):
            ours, peers = socket.socketpair()
            peers.close()
            end = library.iso_end_open(header, None, None, 0, ours.detach())
            assert library.iso_end_await_request(end, 5.0) == ring.Outcome.LOST, i
            library.iso_end_close(end)
    finally:
        stop.set()
        for thread in busy:
            thread.join()


# --- deaths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False], ids=["native loop", "python server"])
def test_a_killed_group_is_noticed_at_once(path: Path, config, native: bool):
    """SIGKILL in any phase of a round trip, 20 times. The link's timeout is 30 s."""
    pauses, rng, took = random.Random(SEED), np.random.default_rng(SEED), []
    for _ in range(20):
        name = uuid.uuid4().hex
        with process(serve_group, path, name, native) as pid:
            link = SharedMemoryLink.open(name, 1 << 16, 30.0, 20.0)
            ask(link, random_message(config, rng, 3))
            killed: list[float] = []

            def kill(pid: int = pid, killed: list[float] = killed) -> None:
                os.kill(pid, signal.SIGKILL)
                killed.append(time.perf_counter())

            timer = threading.Timer(random_pause(pauses), kill)
            timer.start()
            with pytest.raises(LinkError, match="the group is gone"):
                while True:
                    ask(link, random_message(config, rng, int(rng.integers(0, 60))))
            noticed = time.perf_counter()
            timer.join()
            took.append(noticed - killed[0])
            with pytest.raises(LinkError):
                link.send(random_message(config, rng, 1))
            link.close()
    print(f"seed {SEED}: noticed after {statistics.median(took) * 1e3:.1f} ms, {max(took) * 1e3:.1f} ms at most")
    assert statistics.median(took) < 0.1 and max(took) < 1.0, took


@pytest.mark.parametrize("native", [True, False], ids=["native loop", "python server"])
def test_a_killed_shard_is_noticed_at_once_and_others_go_on(path: Path, config, native: bool):
    group = Group(make_worker(path, native), native)
    other, rng, pauses, took = connect(group, "other"), np.random.default_rng(SEED), random.Random(SEED), []
    for i in range(20):
        name = uuid.uuid4().hex
        with process(run_shard, path, name, i) as pid:
            group.meet("victim", name)
            message = random_message(config, rng, 4)
            time.sleep(random_pause(pauses))
            os.kill(pid, signal.SIGKILL)
            took.append(until(lambda: "victim" not in group.server.links()))
            assert torch.equal(ask(other, message), group.worker.compute(message))
    print(f"seed {SEED}: noticed after {statistics.median(took) * 1e3:.1f} ms, {max(took) * 1e3:.1f} ms at most")
    assert statistics.median(took) < 0.1 and max(took) < 1.0, took
    assert set(group.server.links()) == {"other"}
    other.close()
    group.close()


def test_a_stopped_group_is_lost_at_the_timeout(path: Path, config):
    name, rng = uuid.uuid4().hex, np.random.default_rng(14)
    with process(serve_group, path, name, True) as pid:
        link = SharedMemoryLink.open(name, 1 << 16, 0.5, 20.0)
        ask(link, random_message(config, rng, 3))
        stop(pid)
        begin = time.perf_counter()
        with pytest.raises(LinkError, match=r"the group gave no answer for 0\.5 s"):
            ask(link, random_message(config, rng, 3))
        assert 0.45 < time.perf_counter() - begin < 2.0
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
        with pytest.raises(LinkError):  # its late answer must not be taken for the next one's
            ask(link, random_message(config, rng, 3))
        link.close()


# --- the meeting ----------------------------------------------------------------------------------


def test_nobody_comes():
    before = open_files()
    with pytest.raises(LinkError, match="the group did not come"):
        SharedMemoryLink.open(uuid.uuid4().hex, 1 << 16, 1.0, 0.1)
    bell = new_bell()
    with pytest.raises(LinkError, match="no link could be made"):
        accept_shard(uuid.uuid4().hex, bell, 0.1)
    os.close(bell)
    assert open_files() <= before


def test_a_stranger_at_the_meeting(path: Path):
    name = uuid.uuid4().hex
    errors: list[BaseException] = []
    bell = new_bell()

    def group() -> None:
        try:
            accept_shard(name, bell, 5.0)
        except LinkError as error:
            errors.append(error)

    thread = threading.Thread(target=group)
    thread.start()
    address = b"\0isotherm/" + hashlib.sha256(name.encode()).hexdigest()[:40].encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        until(lambda: stranger.connect_ex(address) == 0)
        stranger.send(b"GET / HTTP/1.1\r\n\r\n")
        thread.join()
    assert len(errors) == 1 and "hello" in str(errors[0])
    os.close(bell)


def test_a_segment_that_is_none_is_refused(path: Path):
    loop = NativeLoop(make_worker(path, True), 1.0)
    before, name = open_files(), uuid.uuid4().hex
    segment = os.memfd_create("isotherm test")
    os.ftruncate(segment, 1 << 16)
    mets = []
    thread = threading.Thread(target=lambda: mets.append(join_group(name, segment, 5.0)))
    thread.start()
    with pytest.raises(OSError, match="cannot be mapped"):
        loop.attach("shard", accept_shard(name, loop.bell, 5.0))
    thread.join()
    mets[0].close()
    os.close(segment)
    assert open_files() <= before and loop.links() == {}
    loop.close()


def test_a_segment_that_says_it_is_larger_than_it_is_ends_its_own_link(path: Path, config):
    """Reading beyond a file's end would end the group, with all its links."""
    group = Group(make_worker(path, True), True)
    liar, other, rng = connect(group, "liar"), connect(group, "other"), np.random.default_rng(3)
    message = random_message(config, rng, 4)
    struct.pack_into("q", liar._end.map, 8, 1 << 40)
    with pytest.raises(LinkError):
        ask(liar, message)
    until(lambda: "liar" not in group.server.links())
    assert torch.equal(ask(other, message), group.worker.compute(message))
    for link in (liar, other):
        link.close()
    group.close()


def test_a_segment_takes_memory_only_where_it_is_used():
    segment = new_segment(segment_bytes(7168, 2, 512, 8))
    size = os.fstat(segment)
    assert size.st_size > 58 << 20 and size.st_blocks * 512 <= 8192
    with suppress(PermissionError):
        os.ftruncate(segment, 4096)
    assert os.fstat(segment).st_size == size.st_size, "nobody can cut it under the other's feet"
    os.close(segment)


def test_the_native_loop_wants_native_kernels(path: Path):
    with pytest.raises(TypeError, match="native loop needs native kernels and gate, not reference"):
        NativeLoop(make_worker(path, native=False), 1.0)
    assert isinstance(make_worker(path, native=False).kernels, ReferenceKernels)
