"""The gather window's decision, the gate, and the boundary of the native loop. What goes through links:
tests/actors/links/test_shared_memory.py."""

from __future__ import annotations

import threading
import time
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_there import require_native

from isotherm.kernels.native import ring, signatures
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.library import NativeKernelsUnavailable
from isotherm.kernels.native.ring import NativeExpertLoop, NativeGate, ServedExperts, gather_choose, load

require_native(ring=True)

FIRST, END, NOW, NEVER = 3, 19, 10_000, 2**63 - 1


def choose(*seats: tuple[bool, bool, int, int], window: int = 100) -> tuple[int, int]:
    """Seats: pending, in step, layer, and how long ago that began."""
    rows = np.array(
        [(pending, in_step, layer, NOW - ago) for pending, in_step, layer, ago in seats], dtype=np.int64
    ).reshape(-1, 4)
    return gather_choose(rows, FIRST, END, window, NOW)


seats = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.integers(FIRST, END - 1), st.integers(0, 300)), min_size=0, max_size=6
)


@given(seats, st.integers(0, 200))
def test_what_is_chosen_is_there_and_nobody_is_held_beyond_the_window(
    all_seats: list[tuple[bool, bool, int, int]], window: int
):
    layer, until = choose(*all_seats, window=window)
    pending = [s for s in all_seats if s[0]]
    if not pending:
        assert (layer, until) == (-1, NEVER)
        return
    oldest = max(s[3] for s in pending)
    if layer >= 0:
        assert layer in {s[2] for s in pending}
        if oldest >= window:
            assert layer in {s[2] for s in pending if s[3] == oldest}
    else:
        assert NOW < until <= NOW - oldest + window
        others = [s for s in all_seats if not s[0] and s[1] and s[3] < window]
        assert others, "nobody is waited for who is not inside a step, or has been silent for a window"


@given(st.integers(FIRST, END - 1), st.integers(0, 99), seats)
def test_one_busy_shard_is_served_at_once(layer: int, ago: int, others: list[tuple[bool, bool, int, int]]):
    idle = [(False, False, other_layer, other_ago) for _, _, other_layer, other_ago in others]
    silent = [(False, True, other_layer, 100 + other_ago) for _, _, other_layer, other_ago in others]
    assert choose((True, True, layer, ago), *idle, *silent)[0] == layer


def test_without_a_window_the_oldest_goes_first():
    assert choose((True, True, 5, 3), (True, True, 4, 9), (False, True, 4, 0), window=0)[0] == 4
    assert choose((True, True, 5, 9), (True, True, 4, 3), window=0)[0] == 5


def test_a_message_waits_for_the_shard_that_is_to_reach_its_layer():
    assert choose((True, True, 7, 10), (False, True, 7, 40)) == (-1, NOW + 60)
    assert choose((True, True, 7, 40), (False, True, 7, 10)) == (-1, NOW + 60)
    assert choose((True, True, 7, 10), (True, True, 7, 1))[0] == 7


def test_who_is_behind_goes_first():
    assert choose((True, True, 9, 50), (True, True, 7, 1))[0] == 7
    # The one ahead is held while the one behind is at home.
    assert choose((True, True, 9, 50), (False, True, 7, 1)) == (-1, NOW + 50)
    # The other way about, who is behind is not held for the one ahead.
    assert choose((True, True, 7, 50), (False, True, 9, 1))[0] == 7


def test_layers_go_round():
    """A shard that has begun its next step is ahead of one that ends its last, not behind."""
    assert choose((True, True, FIRST, 50), (True, True, END - 1, 1))[0] == END - 1
    assert choose((True, True, FIRST + 1, 50), (False, True, END - 1, 1))[0] == -1
    assert choose((True, True, 6, 50), (True, True, 12, 1), (True, True, 7, 1))[0] == 6


def test_a_gate_lets_one_in_at_a_time_and_nobody_starve():
    gate, inside, worst = NativeGate(), 0, 0
    stop, taken = threading.Event(), []

    def hog() -> None:
        nonlocal inside, worst
        while not stop.is_set():
            with gate:
                inside += 1
                worst = max(worst, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=hog) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        begin = time.perf_counter()
        with gate:
            assert inside == 0
        taken.append(time.perf_counter() - begin)
    stop.set()
    for thread in threads:
        thread.join()
    assert worst == 1 and sorted(taken)[5] < 0.5


def test_the_loop_checks_its_arrays_and_ends():
    kernels = NativeKernels(torch.bfloat16, 1)
    bank, gate = kernels.expert_bank(2, 64, 32), NativeGate()
    slots, served = np.full((3, 4), -1, np.int32), np.zeros((3, 4), np.int64)
    with pytest.raises(TypeError, match="slots int32 and counts int64"):
        ServedExperts(bank, gate, slots.astype(np.int64), served, 1)
    with pytest.raises(TypeError, match="one shape"):
        ServedExperts(bank, gate, slots, served[:2], 1)
    for _ in range(20):
        loop = NativeExpertLoop(kernels, ServedExperts(bank, gate, slots, served, 1), dtype=1, window=1.0)
        with pytest.raises(OSError, match="cannot be mapped"):
            loop.attach(-1, -1)
        loop.detach(7)
        assert loop.counts().messages == 0
        told: list[object] = []
        waiting = threading.Thread(target=lambda loop=loop, told=told: told.append(loop.next_event()))
        waiting.start()
        loop.close()
        waiting.join(5)
        assert told == [None]


def test_no_memory_for_a_gate_is_said_when_it_is_made(monkeypatch: pytest.MonkeyPatch):
    """It was said by nobody: the first to enter it ended the process."""
    monkeypatch.setattr(ring, "load", lambda _=None: SimpleNamespace(iso_gate_create=lambda: None))
    with pytest.raises(MemoryError, match="no memory for a gate"):
        NativeGate()


def test_a_library_without_links_is_named(tmp_path):
    with pytest.raises(NativeKernelsUnavailable, match=r"gone\.so"):
        load(tmp_path / "gone.so")


def test_a_library_that_can_be_opened_and_lacks_the_functions_is_refused(monkeypatch: pytest.MonkeyPatch):
    """It is an error that says so, not one of the first call."""
    with pytest.raises(NativeKernelsUnavailable, match=r"libm.*don't load.*iso_.*reinstall isotherm"):
        load(Path(cast(str, find_library("m"))))
    monkeypatch.setitem(signatures.LINKS, "not_there", (None, []))
    with pytest.raises(NativeKernelsUnavailable, match=r"no shared-memory links \(.*iso_not_there\).*reinstalled"):
        load.__wrapped__()
