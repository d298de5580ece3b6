"""A link in shared memory, for a shard and an expert group on one host: rows are written once, where the group computes
from them, and outputs where the shard adds them up.

The shard makes an anonymous file (memfd) for the messages, the group one with the bell on which it sleeps; each gets
the other's over a Unix socket in the abstract namespace. So nothing has a name in a file system, and nothing is left
when both are killed. The socket stays open: the system closes it when a process ends, and a thread of the native
library then wakes the survivor. `kernels/native/csrc/ring.h` says how messages lie in the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.links.protocol import (
    DTYPES,
    Dispatch,
    ExpertNotHeldError,
    GroupFailedError,
    Link,
    LinkEnd,
    LinkError,
    Loops,
    PeerDescriptors,
)
from isotherm.cluster.errors import named_line, one_line
from isotherm.cluster.messages.workers import Meeting
from isotherm.kernels.native import ring as native_ring
from isotherm.kernels.native.ring import ALIGNMENT, HEADER_BYTES, LEAST_REPLY, Outcome, Reply

KIND = "shared-memory"
HELLO = struct.Struct("<8sq")  # what both say: MAGIC, bytes of the file that comes with it
MAGIC = b"isolink1"
RETRY = 0.005  # seconds between attempts to reach a group that does not listen yet
REQUEST_FIELDS = 9  # of iso_end_read


# --- the meeting ----------------------------------------------------------------------------------


def new_file(name: str, nbytes: int) -> int:
    """An anonymous file in memory that nobody can shorten: a descriptor. Only what is used takes memory."""
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, nbytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


def new_segment(nbytes: int) -> int:
    file = new_file("isotherm link", nbytes)
    with mmap.mmap(file, HEADER_BYTES) as header:
        native_ring.load().iso_segment_begin(_address_of(header), nbytes)
    return file


def new_bell() -> int:
    return new_file("isotherm bell", HEADER_BYTES)


def accept_shard(name: str, bell: int, timeout: float) -> PeerDescriptors:
    """The group's part: wait for the shard, give it the file of the bell that it shall ring, and get the segment.
    `name` must be fresh. Raises LinkError after `timeout` seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(_address(name))
            listener.listen(1)
            listener.settimeout(timeout)
            peer, _ = listener.accept()
            return _exchange(peer, bell, timeout)
        except (OSError, EOFError) as error:
            raise LinkError(f"no link could be made: {one_line(error)}") from None


def join_group(name: str, segment: int, timeout: float) -> PeerDescriptors:
    """The shard's part: get the group's bell for the segment. Raises LinkError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(timeout)
            peer.connect(_address(name))
            return _exchange(peer, segment, max(deadline - time.monotonic(), RETRY))
        except ConnectionRefusedError:  # the group does not listen yet
            peer.close()
            if time.monotonic() > deadline:
                raise LinkError(f"no link could be made: the group did not come within {timeout:g} s") from None
            time.sleep(RETRY)
        except (OSError, EOFError) as error:
            peer.close()
            raise LinkError(f"no link could be made: {one_line(error)}") from None


def this_machine() -> str:
    """Processes that say the same can meet at a Unix socket without a file: they are on one machine (`boot_id` is new
    at every boot), in one network namespace and of one user. Raises OSError where the system does not say."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.geteuid()}"


def _address(name: str) -> bytes:
    return b"\0isotherm/" + hashlib.sha256(name.encode()).hexdigest()[:40].encode()


def _exchange(peer: socket.socket, own: int, timeout: float) -> PeerDescriptors:
    """Swap files with a peer of the same user. Consumes `peer`."""
    with peer:
        peer.settimeout(timeout)
        _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.geteuid():  # names in the abstract namespace are open to everybody
            raise PermissionError(f"the peer is user {user}, this worker user {os.geteuid()}")
        socket.send_fds(peer, [HELLO.pack(MAGIC, os.fstat(own).st_size)], [own])
        data, files, _, _ = socket.recv_fds(peer, HELLO.size, 1)
        if len(data) < HELLO.size or len(files) != 1 or HELLO.unpack(data)[0] != MAGIC:
            for file in files:
                os.close(file)
            raise EOFError("the peer said something else than hello" if data else "the peer went away")
        os.set_inheritable(files[0], False)
        peer.setblocking(True)
        return PeerDescriptors(files[0], peer.detach())


# --- the two ends ---------------------------------------------------------------------------------


class _End:
    """One end in this process: its mappings and the native object, all freed with the last reference to this."""

    def __init__(self, segment: int, bell: int, met_socket: int, shard: bool) -> None:
        """Takes the segment's and the socket's descriptors over; the bell's is only mapped."""
        self.lib = native_ring.load()
        self._segment, self._shard = segment, shard
        try:
            self.map = mmap.mmap(segment, os.fstat(segment).st_size)
            bell_map = mmap.mmap(bell, HEADER_BYTES)
            own, peer = (None, _address_of(bell_map)) if shard else (_address_of(bell_map), None)
            handle = self.lib.iso_end_open(_address_of(self.map), own, peer, shard, met_socket)
            if not handle:
                raise LinkError("no link could be made: the peer's segment is none, or no descriptor is left")
        except BaseException:
            os.close(segment)
            os.close(met_socket)
            raise
        self.handle: int = handle
        # Both first mappings hold bells, so they stay as long as the native object.
        self.close = weakref.finalize(self, _free, self.lib, handle, segment, (self.map, bell_map))
        # Not at exit: another thread may be inside; the system tells the peer then.
        self.close.atexit = False

    def grow(self, nbytes: int) -> None:
        """Map the segment anew; views of the old mapping stay valid."""
        if self._shard:
            os.ftruncate(self._segment, nbytes)
        self.map = mmap.mmap(self._segment, nbytes)
        self.lib.iso_end_move(self.handle, _address_of(self.map), nbytes, self._shard)


def _free(lib: ctypes.CDLL, handle: int, segment: int, kept: tuple[mmap.mmap, ...]) -> None:
    lib.iso_end_close(handle)
    os.close(segment)
    del kept


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _numbers(memory: mmap.mmap, count: int, offset: int) -> np.ndarray:
    return np.frombuffer(memory, np.int32, count, offset)


def _tensor(memory: mmap.mmap, dtype: torch.dtype, rows: int, width: int, offset: int) -> Tensor:
    if rows * width == 0:
        return torch.empty(rows, width, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=rows * width, offset=offset).view(rows, width)


def segment_bytes(width: int, itemsize: int, rows: int, top_k: int) -> int:
    """Of a segment for messages of up to `rows` rows of `width` elements, each to `top_k` experts."""
    pairs = rows * top_k
    numbers = 4 * (3 * pairs + 1)
    need = HEADER_BYTES + numbers + (rows + pairs) * width * itemsize + LEAST_REPLY + 2 * ALIGNMENT
    return -(-need // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedMemoryLink:
    """The shard's end. `timeout` in seconds: how long a group may stay silent before it counts as lost."""

    kind = KIND

    def __init__(self, segment: int, peer: PeerDescriptors, timeout: float) -> None:
        """Takes all descriptors over."""
        try:
            self._end = _End(segment, peer.file, peer.socket, shard=True)
        finally:
            os.close(peer.file)
        self._lib, self._timeout = self._end.lib, timeout
        self._expected: tuple[int, int, torch.dtype] = (0, 0, torch.float32)  # pairs, width, dtype
        self._reply = (ctypes.c_int64 * 3)()
        self.in_use, self._closing = threading.Lock(), threading.Lock()

    @classmethod
    def open(cls, name: str, nbytes: int, timeout: float, meeting_timeout: float) -> SharedMemoryLink:
        """Meet the group at `name`, with a segment of `nbytes` (it grows where a message needs more). Raises
        LinkError."""
        segment = new_segment(nbytes)
        try:
            peer = join_group(name, segment, meeting_timeout)
        except BaseException:
            os.close(segment)
            raise
        return cls(segment, peer, timeout)

    def send(self, message: Dispatch) -> None:
        x = message.x_UD if message.x_UD.stride(-1) == 1 else message.x_UD.contiguous()
        rows, width = x.shape
        experts, offsets, pairs = (
            np.ascontiguousarray(a, np.int32) for a in (message.experts_A, message.offsets_A1, message.rows_P)
        )
        size = x.element_size()
        self._expected = (len(pairs), width, x.dtype)
        with self.in_use:
            for _ in range(2):
                outcome = self._lib.iso_end_send(
                    self._handle(), message.layer, message.placement_version, experts.ctypes.data, len(experts),
                    offsets.ctypes.data, pairs.ctypes.data, len(pairs), x.data_ptr(), x.stride(0) * size, rows,
                    width * size, DTYPES.index(x.dtype),
                )  # fmt: skip
                if outcome <= 0:
                    break
                self._end.grow(-(-max(outcome, 2 * len(self._end.map)) // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._check(-outcome)

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        """Outputs [P, D], a view that the next `send` overwrites; they come at once."""
        with self.in_use:
            outcome = self._lib.iso_end_receive(self._handle(), self._timeout, self._reply)
            self._check(outcome)
            kind, at, nbytes = self._reply
            memory = self._end.map
        pairs, width, dtype = self._expected
        if kind != Reply.OUTPUT:
            text = memory[at : at + nbytes].decode(errors="replace")
            raise ExpertNotHeldError(text) if kind == Reply.NOT_HELD else GroupFailedError(f"the group failed: {text}")
        if nbytes != pairs * width * dtype.itemsize:
            raise LinkError(f"protocol error: {nbytes} bytes for {pairs} outputs of {width} {dtype}")
        return _tensor(memory, dtype, pairs, width, at)

    @property
    def end(self) -> int | None:
        return self._end.handle if self._end.close.alive else None

    def expect(self, pairs: int, width: int, dtype: torch.dtype) -> None:
        self._expected = (pairs, width, dtype)

    def in_step(self, inside: bool) -> None:
        with self.in_use, contextlib.suppress(LinkError):
            self._lib.iso_end_step(self._handle(), inside)

    def close(self) -> None:
        with self._closing:
            if self._end.close.alive:
                self._lib.iso_end_abandon(self._end.handle)  # a thread that waits in `receive` comes back
                with self.in_use:
                    self._end.close()

    def _handle(self) -> int:
        if not self._end.close.alive:
            raise LinkError("this link was closed")
        return self._end.handle

    def _check(self, outcome: int) -> None:
        if outcome == Outcome.TIMED_OUT:
            raise LinkError(f"the group gave no answer for {self._timeout:g} s")
        if outcome != Outcome.READY:
            raise LinkError("the group closed the link" if outcome == Outcome.CLOSED else "the group is gone")


class SharedMemoryServerLink:
    """The group's end, for a loop in Python (`PythonLoop`). `receive` may be called by one thread while another calls
    `reply`. Freed, and the shard told, when nobody refers to it any more."""

    kind = KIND

    def __init__(self, peer: PeerDescriptors, bell: int) -> None:
        """`bell`: the file that the shard was given. Takes all descriptors over."""
        try:
            self._end = _End(peer.file, bell, peer.socket, shard=False)
        finally:
            os.close(bell)

    def receive(self) -> tuple[int, Dispatch] | None:
        """Wait for the next dispatch, as long as it takes → (sequence number, message), or None when the shard has
        closed the link. The message lies in shared memory: it stays as it is until it is answered. Raises LinkError
        when the shard is gone."""
        end, lib = self._end, self._end.lib
        outcome = lib.iso_end_await_request(end.handle, -1.0)
        if outcome == Outcome.CLOSED:
            return None
        if outcome != Outcome.READY:
            raise LinkError("the shard is gone")
        if (nbytes := lib.iso_end_bytes(end.handle)) > len(end.map):
            end.grow(nbytes)
        fields = (ctypes.c_int64 * REQUEST_FIELDS)()
        if wrong := lib.iso_end_read(end.handle, len(end.map), fields):
            raise LinkError(f"protocol error: {wrong.decode()}")
        sequence, layer, version, active, pairs, rows, row_bytes, dtype, x_at = fields
        numbers = _numbers(end.map, 2 * active + 1 + pairs, HEADER_BYTES)
        experts_A, offsets_A1, rows_P = np.split(numbers, [active, 2 * active + 1])
        x_UD = _tensor(end.map, DTYPES[dtype], rows, row_bytes // DTYPES[dtype].itemsize, x_at)
        return sequence, Dispatch(layer, version, x_UD, rows_P, experts_A, offsets_A1)

    def reply(self, sequence: int, output_PD: Tensor) -> None:
        output = output_PD.contiguous()
        self._answer(Reply.OUTPUT, sequence, output.data_ptr(), output.nbytes)

    def refuse(self, sequence: int, error: Exception) -> None:
        """Say why there is no output."""
        text = named_line(error).encode()[:LEAST_REPLY]
        self._answer(
            Reply.NOT_HELD if isinstance(error, ExpertNotHeldError) else Reply.FAILED, sequence, text, len(text)
        )

    def _answer(self, kind: Reply, sequence: int, data: int | bytes, nbytes: int) -> None:
        if not self._end.lib.iso_end_reply(self._end.handle, sequence, kind, data, nbytes):
            raise LinkError("the shard is gone, or the reply does not fit what it asked for")


class SharedMemory:
    """The carrier."""

    kind = KIND

    def unavailable_reason(self) -> str | None:
        try:
            this_machine()
        except OSError as error:
            return f"this system does not say which machine it is ({error})"
        return native_ring.unavailable_reason()

    def open(self, meeting: Meeting, end: LinkEnd, most_rows: int) -> Link:
        nbytes = segment_bytes(end.width, end.dtype.itemsize, most_rows, end.top_k)
        return SharedMemoryLink.open(meeting.prefix, nbytes, end.timeout, meeting.timeout)

    def accept(self, meeting: Meeting, end: LinkEnd, shard: str, loops: Loops) -> None:
        if loops.native is not None:
            loops.native.attach(shard, accept_shard(meeting.prefix, loops.native.bell, meeting.timeout))
            return
        bell = new_bell()
        try:
            peer = accept_shard(meeting.prefix, bell, meeting.timeout)
        except BaseException:
            os.close(bell)
            raise
        loops.python.attach(shard, SharedMemoryServerLink(peer, bell))
