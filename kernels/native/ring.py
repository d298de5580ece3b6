"""Links in shared memory and the expert group's loop over them, in C++ (`kernels/native/csrc/ring.cpp`,
`expert_loop.cpp`), reached through ctypes.

Wrappers only: who meets whom, and how the memory comes to both, is the caller's.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np

from isotherm.kernels.native import library as native_library
from isotherm.kernels.native import signatures
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.context import created, free_with
from isotherm.kernels.native.library import NativeKernelsUnavailable
from isotherm.kernels.native.weights import NativeExpertBank

HEADER_BYTES = 4096  # kHeaderBytes in ring.h: a segment's header, and the whole of a bell
ALIGNMENT = 64  # kAlign
LEAST_REPLY = 4096  # kLeastReply
MOST_TEXT = 4096


class Outcome(IntEnum):
    """Of waiting for a peer; `Outcome` in ring.h."""

    READY = 0
    TIMED_OUT = 1
    LOST = 2
    CLOSED = 3


class Reply(IntEnum):
    """`ReplyKind` in ring.h."""

    OUTPUT = 2
    NOT_HELD = 3
    FAILED = 4


class LoopEvent(IntEnum):
    """`Event::Kind` in expert_loop.h."""

    CLOSED = 1
    LOST = 2
    BROKEN = 3
    REFUSED = 4


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """The native library with the types of its links set too. Raises NativeKernelsUnavailable."""
    library = native_library.load(path)
    try:
        signatures.set_types(library, signatures.LINKS)
    except AttributeError as error:
        raise NativeKernelsUnavailable(
            f"this build has no shared-memory links ({error}); they need Linux, and isotherm reinstalled"
        ) from error
    return library


def unavailable_reason() -> str | None:
    """Why this process can have no link in shared memory; None where it can."""
    try:
        load()
    except NativeKernelsUnavailable as error:
        return str(error)
    return None


class NativeGate:
    """A fair lock that C++ takes too: held while experts are computed, and while one is named or unnamed. A context
    manager."""

    def __init__(self, library: Path | None = None) -> None:
        self._lib = load(library)
        self.handle = created(self._lib.iso_gate_create(), "a gate")
        free_with(self, self._lib.iso_gate_destroy, self.handle)

    def __enter__(self) -> None:
        self._lib.iso_gate_enter(self.handle)

    def __exit__(self, *_: object) -> None:
        self._lib.iso_gate_leave(self.handle)


@dataclass(frozen=True)
class LoopCounts:
    """Since the loop began; `Count` in expert_loop.h."""

    messages: int
    computations: int  # fewer than messages where some were gathered
    gathered: int  # messages that shared a computation
    pairs: int
    busy_ns: int  # computing
    held_ns: int  # holding messages in the gather window
    refused: int
    beats: int  # turns of the loop: signs of life
    began_ns: int  # when the computation under way began, by the system's monotonic clock; 0: there is none
    longest_ns: int  # of late computations but one, which may have been a pause
    thread: int  # the system's id of it


@dataclass(frozen=True)
class ServedExperts:
    """What a loop serves. `slot_of` int32 and `rows_served` int64 are [layers, experts] and stay the caller's: the loop
    reads the first and counts rows in the second, both inside `gate`. Raises TypeError."""

    bank: NativeExpertBank
    gate: NativeGate
    slot_of: np.ndarray
    rows_served: np.ndarray
    first_layer: int  # the first with experts

    def __post_init__(self) -> None:
        slot_of, rows_served = self.slot_of, self.rows_served
        if slot_of.dtype != np.int32 or rows_served.dtype != np.int64 or slot_of.shape != rows_served.shape:
            raise TypeError(
                f"slots int32 and counts int64 of one shape are needed, not {slot_of.dtype} {slot_of.shape} and "
                f"{rows_served.dtype} {rows_served.shape}"
            )


class NativeExpertLoop:
    """The C++ thread that serves an expert bank over links in shared memory.

    `dtype`: the number of `kernels`' dtype in messages. `window`: how long a message is held for other busy shards, in
    multiples of the time that a layer takes; 0: never.
    """

    def __init__(
        self, kernels: NativeKernels, served: ServedExperts, *, dtype: int, window: float, library: Path | None = None
    ) -> None:
        self._lib = load(library)
        self._kept = (kernels, served)  # C++ uses their memory
        layers, experts = served.slot_of.shape
        handle = self._lib.iso_loop_create(
            kernels.context.handle, served.bank.handle, served.gate.handle, served.slot_of.ctypes.data,
            served.rows_served.ctypes.data, layers, experts, served.first_layer,
            served.bank.hidden * kernels.dtype.itemsize, dtype, window,
        )  # fmt: skip
        if not handle:
            raise OSError("no memory, descriptor or thread for an expert loop")
        self._handle: int = handle
        self._reading = threading.Lock()
        self.bell: int = self._lib.iso_loop_bell(handle)  # descriptor of the page that shards ring; the loop's

    def attach(self, segment: int, socket: int) -> int:
        """Serve a link from now on → its number. Takes both descriptors over. Raises OSError, and then leaves them."""
        number: int = self._lib.iso_loop_attach(self._handle, segment, socket)
        if number < 0:
            raise OSError("the link's segment cannot be mapped, or is none")
        return number

    def detach(self, number: int) -> None:
        """Close a link, after the computation under way. One that has ended already is no error."""
        self._lib.iso_loop_detach(self._handle, number)

    def next_event(self) -> tuple[int, LoopEvent, str] | None:
        """Wait for news: (link, what, in words). None once the loop has been stopped. For one thread."""
        out, text = (ctypes.c_int64 * 2)(), ctypes.create_string_buffer(MOST_TEXT)
        with self._reading:
            if not self._handle or not self._lib.iso_loop_event(self._handle, out, text, MOST_TEXT):
                return None
        return out[0], LoopEvent(out[1]), text.value.decode(errors="replace")

    def prod(self) -> None:
        """Have the thread take another turn, where it sleeps."""
        self._lib.iso_loop_prod(self._handle)

    def counts(self) -> LoopCounts:
        out = (ctypes.c_int64 * len(LoopCounts.__dataclass_fields__))()
        self._lib.iso_loop_counts(self._handle, out)
        return LoopCounts(*out)

    def close(self) -> None:
        """End the thread, after the computation under way, and all links. Nothing else may be called afterwards."""
        self._lib.iso_loop_stop(self._handle)
        with self._reading:
            self._lib.iso_loop_destroy(self._handle)
            self._handle = 0


def gather_choose(seats: np.ndarray, first: int, end: int, window: int, now: int) -> tuple[int, int]:
    """What `choose` in gather.h says, for tests: seats int64 [n, 4] of (pending, in step, layer, since) → (layer or -1,
    until)."""
    seats, out = np.ascontiguousarray(seats, dtype=np.int64), (ctypes.c_int64 * 2)()
    load().iso_gather_choose(seats.ctypes.data, len(seats), first, end, window, now, out)
    return out[0], out[1]
