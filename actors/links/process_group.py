"""A link over a two-rank torch.distributed process group: rank 0 is the shard, rank 1 the expert group.

Every message is a header of int64[HEADER] on tag 0 and, where it is not empty, a body on tag 1. Raw bytes only, over
gloo.

A dispatch's body: experts int32[A], offsets int32[A+1], rows int32[P], zeros up to a multiple of 64, then the rows'
bytes. A reply's body: the outputs' bytes, or a message in UTF-8.

Between two GPUs rows and outputs are in no body: they go from device to device over a second process group (`DataLane`,
NCCL), after the message that announces them. Where one end is on a GPU and the other is not, bodies pass through pinned
memory.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from isotherm.actors.links.protocol import DTYPES, Dispatch, ExpertNotHeldError, GroupFailedError, LinkError

HEADER = 9
DISPATCH, OUTPUT, NOT_HELD, FAILED, CLOSE = 1, 2, 3, 4, 5
ALIGNMENT = 64
FOREVER = timedelta(days=3650)
CLOSING = timedelta(seconds=1)  # a peer that hangs need not be told
CPU = torch.device("cpu")


class Rendezvous:
    """Hosts the key-value store through which new links find each other; on one address only, at a port of its own."""

    def __init__(self, host: str):
        listener = socket.create_server((host, 0))
        self.host, self.port = host, listener.getsockname()[1]
        self._store = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def open_process_group(
    store_host: str, store_port: int, prefix: str, rank: int, own_host: str, timeout: float
) -> ProcessGroupGloo:
    """One end of a fresh two-rank gloo group; blocks until the peer has come. `prefix` must never have been used
    before, a failed attempt included. `timeout` in seconds bounds the meeting. Raises LinkError."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs leave these out
    options._timeout = timedelta(seconds=timeout)
    options._threads = 1
    try:
        options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
        store = TCPStore(store_host, store_port, is_master=False, timeout=timedelta(seconds=timeout))
        return ProcessGroupGloo(PrefixStore(prefix, store), rank, 2, options)
    except RuntimeError as error:
        raise LinkError(f"no link could be made: {_first_line(error)}") from None


class DataLane:
    """Rows from device to device, over a process group of their own with the same two ranks; what they are was said on
    the other one.

    On a GPU nothing here waits for what the device computes meanwhile: receiving has a stream of its own, so that the
    shared experts overlap the exchange. `abort` ends what hangs on the device.
    """

    def __init__(
        self, group: Any, peer: int, device: torch.device, timeout: float, abort: Callable[[], None] = lambda: None
    ):
        self._group, self._peer, self._device, self._timeout, self._abort = group, peer, device, timeout, abort
        self._receiving = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: tuple[Any, Tensor] | None = None  # under way until the peer's next message

    def send(self, rows: Tensor) -> None:
        """Start sending, after what the current stream has still to compute of `rows`."""
        if rows.numel():
            try:
                self._sent = self._group.send([rows], self._peer, 0), rows
            except RuntimeError as error:
                raise LinkError(_first_line(error)) from None

    def receive(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], ready for any stream. Raises LinkError when the peer does not send within the timeout, and
        then ends this lane."""
        with self._stream():
            into = torch.empty(rows, width, dtype=dtype, device=self._device)
            if not into.numel():
                return into
            try:
                work = self._group.recv([into], self._peer, 0)
            except RuntimeError as error:
                raise LinkError(_first_line(error)) from None
            self._wait(work)
        if self._receiving is not None:
            into.record_stream(torch.cuda.current_stream(self._device))
        return into

    def greet(self, first: bool) -> None:
        """Exchange one element: a lane that cannot work is found when the link is made."""
        hello = torch.ones(1, 1, device=self._device)
        if first:
            self.send(hello)
            self.receive(1, 1, hello.dtype)
        else:
            self.receive(1, 1, hello.dtype)
            self.send(hello)

    def close(self) -> None:
        self._abort()

    def _stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._receiving is None else torch.cuda.stream(self._receiving)

    def _wait(self, work: Any) -> None:
        """On the host: a peer that has died would hang the device for ever. NCCL's own wait sleeps for a millisecond at
        a time, which is too long."""
        try:
            if self._receiving is None:
                _wait(work, timedelta(seconds=self._timeout))
                return
            deadline = time.monotonic() + self._timeout
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise LinkError(f"the peer announced rows and sent none for {self._timeout:g} s")
                time.sleep(0)  # lets other threads run
        except (LinkError, RuntimeError) as error:
            self._abort()
            raise LinkError(_first_line(error)) from None


def open_data_lane(
    store_host: str, store_port: int, prefix: str, rank: int, device: torch.device, meeting: float, timeout: float
) -> DataLane:
    """One end of a two-rank NCCL group beside the process group that was opened with the same `prefix`; blocks until
    rows have gone both ways. `meeting`: seconds that this may take; `timeout`: seconds for rows that were announced.
    Raises LinkError."""
    try:
        from torch.distributed import ProcessGroupNCCL
    except ImportError:
        raise LinkError(
            f"no link could be made: torch {torch.__version__} has no NCCL, over which rows go between two GPUs"
        ) from None
    try:
        store = TCPStore(store_host, store_port, is_master=False, timeout=timedelta(seconds=meeting))
        options: Any = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=meeting)
        group: Any = ProcessGroupNCCL(PrefixStore(f"{prefix}/rows", store), rank, 2, options)
        lane = DataLane(group, 1 - rank, device, meeting, group.abort)
        lane.greet(first=rank == 0)
    except (RuntimeError, LinkError) as error:
        raise LinkError(f"no link could be made over NCCL: {_first_line(error)}") from None
    lane._timeout = timeout
    return lane


class HostMemory:
    """Where the bodies of messages lie on the host. For rows on a GPU that is pinned memory, used again and again: a
    body is sent or copied before the next is taken."""

    def __init__(self, device: torch.device, allocate: Callable[[int], Tensor] | None = None):
        self.reused = device.type != "cpu" or allocate is not None
        self._allocate = allocate or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes]."""
        if not self.reused:
            return torch.empty(nbytes, dtype=torch.uint8)
        if len(self._memory) < nbytes:
            self._memory = self._allocate(max(nbytes, 2 * len(self._memory)))
        return self._memory[:nbytes]


class _Wire:
    """Sends and receives (header, body) over one process group."""

    def __init__(
        self, group: ProcessGroupGloo, peer: int, device: torch.device, allocate: Callable[[int], Tensor] | None
    ):
        self._group: Any = group  # torch's stubs leave out send and recv
        self._peer, self._device = peer, device
        self._pending: list = []
        self._outgoing, self._incoming = HostMemory(device, allocate), HostMemory(device, allocate)

    def body(self, nbytes: int, timeout: timedelta = FOREVER) -> Tensor:
        """uint8 [nbytes] for what is sent next."""
        if self._outgoing.reused:
            self.flush(timeout)
        return self._outgoing.take(nbytes)

    def bytes_of(self, rows: Tensor) -> Tensor:
        """uint8, on the host, of rows that are sent next."""
        flat = rows.contiguous().flatten().view(torch.uint8)
        return self.body(len(flat)).copy_(flat) if self._outgoing.reused else flat

    def rows(self, body: Tensor, dtype: torch.dtype, width: int) -> Tensor:
        """The rows in what was received, on this end's device."""
        return body.view(dtype).view(-1, width).to(self._device, copy=self._incoming.reused)

    def numbers(self, body: Tensor) -> np.ndarray:
        """The int32s in what was received."""
        numbers = body.numpy().view(np.int32)
        return numbers.copy() if self._incoming.reused else numbers

    def send(self, kind: int, fields: tuple[int, ...], body: Tensor | None, timeout: timedelta = FOREVER) -> None:
        """Start sending, once what was sent before has gone (within `timeout`); the body's memory must stay as it is
        until it has gone too."""
        self.flush(timeout)
        nbytes = 0 if body is None else body.numel()
        header = torch.zeros(HEADER, dtype=torch.int64)
        header[: 2 + len(fields)] = torch.tensor([kind, nbytes, *fields])
        try:
            self._pending = [(self._group.send([header], self._peer, 0), header)]
            if body is not None and nbytes:
                self._pending.append((self._group.send([body], self._peer, 1), body))
        except RuntimeError as error:
            raise LinkError(_first_line(error)) from None

    def flush(self, timeout: timedelta) -> None:
        """Wait until what was sent has gone: a body goes when the peer asks for it, so never to one that hangs."""
        pending, self._pending = self._pending, []
        for work, _ in pending:
            _wait(work, timeout)

    def receive(self, timeout: timedelta) -> tuple[int, list[int], Tensor]:
        """kind, fields, body uint8. `timeout` holds for the header and for the body apart."""
        header = torch.empty(HEADER, dtype=torch.int64)
        self._receive(header, 0, timeout)
        kind, nbytes, *fields = header.tolist()
        body = self._incoming.take(nbytes)
        if nbytes:
            self._receive(body, 1, timeout)
        return kind, fields, body

    def _receive(self, into: Tensor, tag: int, timeout: timedelta) -> None:
        try:
            work = self._group.recv([into], self._peer, tag)
        except RuntimeError as error:
            raise LinkError(_first_line(error)) from None
        _wait(work, timeout)


def _wait(work, timeout: timedelta) -> None:
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise LinkError(_first_line(error)) from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class ProcessGroupLink:
    """The shard's end. `timeout` in seconds: how long a group may stay silent before it counts as lost. `device`: where
    rows come from and outputs go to. `lane`: their own way there. `allocate` gives the memory for bodies where `device`
    is a GPU."""

    kind = "process-group (gloo)"
    kind_with_lane = "process-group (gloo, rows over NCCL)"

    def __init__(self, group: ProcessGroupGloo, timeout: float, device: torch.device = CPU,
                 lane: DataLane | None = None, allocate: Callable[[int], Tensor] | None = None):  # fmt: skip
        self._wire, self._lane = _Wire(group, 1, device, allocate), lane
        if lane is not None:
            self.kind = self.kind_with_lane
        self._timeout = timedelta(seconds=timeout)
        self._sequence = 0
        self._expected: tuple[int, int, torch.dtype] = (0, 0, torch.float32)  # pairs, width, dtype

    def send(self, message: Dispatch) -> None:
        self._sequence += 1
        x, rows = message.x_UD.contiguous(), len(message.rows_P)
        self._expected = (rows, x.shape[1], x.dtype)
        numbers = np.concatenate([message.experts_A, message.offsets_A1, message.rows_P]).view(np.uint8)
        begin = len(numbers) + -len(numbers) % ALIGNMENT
        body = self._wire.body(begin + (0 if self._lane else x.nbytes), self._timeout)
        body[: len(numbers)] = torch.from_numpy(numbers)
        if self._lane is None:
            body[begin:] = x.flatten().view(torch.uint8)
        fields = (
            self._sequence,
            message.layer,
            message.placement_version,
            len(message.experts_A),
            rows,
            DTYPES.index(x.dtype),
            len(x),
        )
        self._wire.send(DISPATCH, fields, body, self._timeout)
        if self._lane is not None:
            self._lane.send(x)

    def receive(self) -> Tensor:
        self._wire.flush(self._timeout)
        kind, fields, body = self._wire.receive(self._timeout)
        if fields[0] != self._sequence:
            raise LinkError(f"protocol error: answer {fields[0]} to message {self._sequence}")
        if kind == NOT_HELD:
            raise ExpertNotHeldError(bytes(body.numpy()).decode())
        if kind == FAILED:
            raise GroupFailedError(f"the group failed: {bytes(body.numpy()).decode(errors='replace')}")
        if kind != OUTPUT:
            raise LinkError(f"protocol error: an answer of kind {kind}")
        pairs, width, dtype = self._expected
        return self._wire.rows(body, dtype, width) if self._lane is None else self._lane.receive(pairs, width, dtype)

    def in_step(self, inside: bool) -> None:
        pass  # the group computes what comes in the order in which it comes

    def close(self) -> None:
        try:
            self._wire.send(CLOSE, (), None, CLOSING)
            self._wire.flush(CLOSING)
        except LinkError:
            pass  # the peer is gone already
        if self._lane is not None:
            self._lane.close()


class ProcessGroupServerLink:
    """The group's end, with `device`, `lane` and `allocate` as at the shard's. `receive` may be called by one thread
    while another calls `reply`."""

    kind = ProcessGroupLink.kind

    def __init__(self, group: ProcessGroupGloo, hidden: int, device: torch.device = CPU, lane: DataLane | None = None,
                 allocate: Callable[[int], Tensor] | None = None):  # fmt: skip
        self._wire, self._lane, self._hidden = _Wire(group, 0, device, allocate), lane, hidden
        if lane is not None:
            self.kind = ProcessGroupLink.kind_with_lane

    def receive(self) -> tuple[int, Dispatch] | None:
        """Wait for the next dispatch, as long as it takes → (sequence number, message), or None when the shard has
        closed the link. Raises LinkError when the shard is gone."""
        kind, fields, body = self._wire.receive(FOREVER)
        if kind == CLOSE:
            if self._lane is not None:
                self._lane.close()
            return None
        if kind != DISPATCH:
            raise LinkError(f"protocol error: message of kind {kind}")
        sequence, layer, version, active, pairs, dtype, rows = fields
        numbers = self._wire.numbers(body[: 4 * (2 * active + 1 + pairs)])
        if self._lane is None:
            begin = len(numbers) * 4 + -len(numbers) * 4 % ALIGNMENT
            x_UD = self._wire.rows(body[begin:], DTYPES[dtype], self._hidden)
        else:
            x_UD = self._lane.receive(rows, self._hidden, DTYPES[dtype])
        experts_A, offsets_A1, rows_P = np.split(numbers, [active, 2 * active + 1])
        return sequence, Dispatch(layer, version, x_UD, rows_P, experts_A, offsets_A1)

    def reply(self, sequence: int, output_PD: Tensor) -> None:
        if self._lane is None:
            self._answer(OUTPUT, sequence, self._wire.bytes_of(output_PD))
        else:
            self._answer(OUTPUT, sequence, None)
            self._lane.send(output_PD.contiguous())

    def refuse(self, sequence: int, error: Exception) -> None:
        """Say why there is no output."""
        kind = NOT_HELD if isinstance(error, ExpertNotHeldError) else FAILED
        self._answer(
            kind, sequence, torch.frombuffer(bytearray(f"{type(error).__name__}: {error}".encode()), dtype=torch.uint8)
        )

    def _answer(self, kind: int, sequence: int, body: Tensor | None) -> None:
        # Not flushed: a shard that hangs must not hold the thread that computes for all. The next message comes after
        # this answer has gone.
        self._wire.send(kind, (sequence,), body)
