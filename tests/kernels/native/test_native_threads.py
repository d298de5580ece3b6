"""The threads of the native library: who packs and who computes, and what is left where the system gives no more of
them."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from native_there import require_native
from torch import Tensor
from weight_cases import filled_banks

from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.native import ring
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.library import NativeKernelsUnavailable

pytestmark = pytest.mark.slow

require_native(ring=True)

TASKS = Path("/proc/self/task")


def tasks() -> set[int]:
    return {int(task.name) for task in TASKS.iterdir()}


def ticks(threads: set[int]) -> int:
    """Hundredths of a second for which these threads have run."""
    fields = ((TASKS / str(thread) / "stat").read_text().rsplit(")", 1)[1].split() for thread in threads)
    return sum(int(f[11]) + int(f[12]) for f in fields)


def until_it_has_run(threads: set[int], step: Callable[[], object]) -> None:
    """Take steps until these threads have had a twentieth of a second."""
    before, deadline = ticks(threads), time.monotonic() + 60
    while ticks(threads) < before + 5:
        assert time.monotonic() < deadline, "they do nothing"
        step()


def test_packing_leaves_the_threads_that_compute_to_those_who_compute():
    """A group that loads experts computes with one thread meanwhile, if it has to share them."""
    weight, x = PlainWeight(torch.randn(1024, 1024).bfloat16()), torch.randn(1, 1024).bfloat16()
    before = tasks()
    kernels = NativeKernels(torch.bfloat16, 3)
    computing = tasks() - before

    def pack() -> None:
        kernels.pack_linear([weight])

    pack()
    packing = tasks() - before - computing
    assert len(computing) == len(packing) == 2

    idle = ticks(computing)
    until_it_has_run(packing, pack)
    assert ticks(computing) <= idle + 1, "whoever packs alone wakes nobody else"
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert {os.getpriority(os.PRIO_PROCESS, thread) - own for thread in computing} == {0}
    assert {os.getpriority(os.PRIO_PROCESS, thread) - own for thread in packing} == {min(10, 19 - own)}

    packed = kernels.pack_linear([weight])
    stop = threading.Event()

    def pack_on() -> None:
        while not stop.is_set():
            pack()

    thread = threading.Thread(target=pack_on)
    thread.start()
    try:
        until_it_has_run(computing, lambda: kernels.linear(x, packed))
    finally:
        stop.set()
        thread.join()


def test_experts_that_are_long_to_read_have_more_threads():
    before = tasks()
    alone, kernels = NativeKernels(torch.bfloat16, 1), NativeKernels(torch.bfloat16, 1)
    assert tasks() <= before, "one thread is the caller"
    kernels.context.spread(3)
    more = tasks() - before
    assert len(more) == 2
    large, own = filled_banks([kernels, alone], 2, 1024, 1024, "bf16")
    (small,) = filled_banks([kernels], 2, 64, 64, "bf16")

    def computed(by: NativeKernels, bank: ExpertBank, rows: int = 1) -> Tensor:
        each = torch.arange(rows, dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
        return by.experts(x[:rows, : bank.hidden], bank, *each, torch.tensor([0, rows], dtype=torch.int32))

    x = torch.randn(4000, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    until_it_has_run(more, lambda: computed(kernels, large))
    assert torch.equal(computed(kernels, large), computed(alone, own))
    idle = ticks(more)
    for _ in range(2000):
        computed(kernels, small)
    assert ticks(more) <= idle + 1, "little work wakes nobody"
    until_it_has_run(more, lambda: computed(kernels, small, 4000))


def test_threads_end_with_their_kernels():
    weight, before = PlainWeight(torch.randn(64, 64)), tasks()
    for _ in range(5):
        kernels = NativeKernels(torch.bfloat16, 3)
        kernels.pack_linear([weight])
        assert len(tasks() - before) >= 4
        del kernels
        gc.collect()
        deadline = time.monotonic() + 10
        while not tasks() <= before:  # a thread that was joined may be seen for a moment yet
            assert time.monotonic() < deadline
            time.sleep(0.001)


# --- no more threads ------------------------------------------------------------------------------


def held() -> tuple[object, ...]:
    """What must be as it was: signals, descriptors, bells."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return signal.pthread_sigmask(signal.SIG_BLOCK, []), len(os.listdir("/proc/self/fd")), maps.count("isotherm bell")


@contextmanager
def room(for_bytes: int) -> Iterator[None]:
    """So much more address space and no more, in which nothing may stay: a thread's stack takes two megabytes at the
    least."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before, pages = held(), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + for_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert held() == before, (held(), before)


def loop(kernels: NativeKernels) -> ring.NativeExpertLoop:
    slots, rows = np.full((3, 4), -1, np.int32), np.zeros((3, 4), np.int64)
    served = ring.ServedExperts(kernels.expert_bank(2, 64, 32), ring.NativeGate(), slots, rows, 1)
    return ring.NativeExpertLoop(kernels, served, dtype=1, window=1.0)


def without_a_loop() -> None:
    kernels = NativeKernels(torch.bfloat16, 1)
    with room(1 << 20), pytest.raises(OSError, match="no memory, descriptor or thread"):
        loop(kernels)


def without_a_watcher() -> None:
    library, segment = ring.load(), mmap.mmap(-1, ring.HEADER_BYTES)
    header = ctypes.addressof(ctypes.c_char.from_buffer(segment))
    library.iso_segment_begin(header, ring.HEADER_BYTES)
    ours, peers = socket.socketpair()
    with ours, peers:
        with room(1 << 20):
            assert library.iso_end_open(header, None, None, 0, ours.fileno()) is None
        end = library.iso_end_open(header, None, None, 0, os.dup(ours.fileno()))
        assert end is not None, "with room there is one again"
        library.iso_end_close(end)


def without_a_pool() -> None:
    with room(40 << 20), pytest.raises(NativeKernelsUnavailable, match="could not start their threads"):
        NativeKernels(torch.bfloat16, 256)


def without_packers() -> None:
    kernels, weight = NativeKernels(torch.bfloat16, 64), PlainWeight(torch.randn(64, 64))
    with room(40 << 20), pytest.raises(MemoryError):
        kernels.pack_linear([weight])
    assert kernels.pack_linear([weight]).nbytes > 0, "with room there are some again"


CASES = {case.__name__: case for case in (without_a_loop, without_a_watcher, without_a_pool, without_packers)}


@pytest.mark.parametrize("name", CASES)
def test_a_thread_that_cannot_be_started_is_an_error_and_leaves_nothing(name: str):
    """In a process of its own, which it must not end."""
    helpers = str(Path(__file__).parents[2] / "helpers")
    path = os.pathsep.join(filter(None, (helpers, os.environ.get("PYTHONPATH"))))
    command, environment = [sys.executable, __file__, name], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    CASES[sys.argv[1]]()
    loop(NativeKernels(torch.bfloat16, 2)).close()  # with room all is well
