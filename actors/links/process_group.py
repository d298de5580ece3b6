"""A link over a two-rank torch.distributed process group: rank 0 is the shard, rank 1 the expert group.

Every message is a header of int64[HEADER] on tag 0 and, where it is not empty, a body on tag 1, with a word on tag 2
behind a large one. Raw bytes only, over gloo.

A dispatch's body: experts int32[A], offsets int32[A+1], rows int32[P], zeros up to a multiple of 64, then the rows'
bytes. A reply's body: the outputs' bytes, or a message in UTF-8.

Between two GPUs rows and outputs are in no body: they go from device to device over a second process group (`DataLane`,
NCCL), after the message that announces them. Where one end is on a GPU and the other is not, bodies pass through pinned
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from isotherm.actors.links.device_lane import DataLane, open_data_lane
from isotherm.actors.links.protocol import (
    DTYPES,
    Dispatch,
    ExpertNotHeldError,
    GroupFailedError,
    Link,
    LinkEnd,
    LinkError,
    Loops,
)
from isotherm.actors.links.wire import FOREVER, Wire
from isotherm.cluster.errors import named_line, one_line
from isotherm.cluster.messages.workers import Meeting

DISPATCH, OUTPUT, NOT_HELD, FAILED, CLOSE = 1, 2, 3, 4, 5
ALIGNMENT = 64
CLOSING = timedelta(seconds=1)  # a peer that hangs need not be told
CPU = torch.device("cpu")


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
        raise LinkError(f"no link could be made: {one_line(error)}") from None


class ProcessGroupLink:
    """The shard's end. `timeout` in seconds: how long a group may stay silent before it counts as lost. `device`: where
    rows come from and outputs go to. `lane`: their own way there. `allocate` gives the memory for bodies where `device`
    is a GPU."""

    kind = "process-group (gloo)"
    kind_with_lane = "process-group (gloo, rows over NCCL)"

    def __init__(
        self,
        group: ProcessGroupGloo,
        timeout: float,
        *,
        device: torch.device = CPU,
        lane: DataLane | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ):
        self._wire, self._lane = Wire(group, 1, device, allocate), lane
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

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        kind, fields, body = self._wire.receive(self._timeout, progress)
        self._wire.flush(self._timeout)  # at once: there is an answer to it
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

    def __init__(
        self,
        group: ProcessGroupGloo,
        hidden: int,
        *,
        device: torch.device = CPU,
        lane: DataLane | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ):
        self._wire, self._lane, self._hidden = Wire(group, 0, device, allocate), lane, hidden
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
        self._answer(kind, sequence, torch.frombuffer(bytearray(named_line(error).encode()), dtype=torch.uint8))

    def _answer(self, kind: int, sequence: int, body: Tensor | None) -> None:
        # Not flushed: a shard that hangs must not hold the thread that computes for all. The next message comes after
        # this answer has gone.
        self._wire.send(kind, (sequence,), body)


@dataclass(frozen=True)
class ProcessGroups:
    """The carrier. `lane`: rows go from GPU to GPU over NCCL, beside the process group of the hosts."""

    kind: str
    lane: bool

    def unavailable_reason(self) -> str | None:
        return None

    def open(self, meeting: Meeting, end: LinkEnd, most_rows: int) -> Link:
        group, lane = self.meet(meeting, end, rank=0)
        return ProcessGroupLink(group, end.timeout, device=end.device, lane=lane)

    def accept(self, meeting: Meeting, end: LinkEnd, shard: str, loops: Loops) -> None:
        group, lane = self.meet(meeting, end, rank=1)
        loops.python.attach(shard, ProcessGroupServerLink(group, end.width, device=end.device, lane=lane))

    def meet(self, meeting: Meeting, end: LinkEnd, rank: int) -> tuple[ProcessGroupGloo, DataLane | None]:
        """The hosts' process group, and the lane for rows between two GPUs. Raises LinkError."""
        store = meeting.store_host, meeting.store_port, meeting.prefix
        group = open_process_group(*store, rank, end.host, meeting.timeout)
        if not self.lane:
            return group, None
        return group, open_data_lane(*store, rank, device=end.device, meeting=meeting.timeout, timeout=end.timeout)
