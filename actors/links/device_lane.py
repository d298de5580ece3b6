"""The part of a link between two GPUs that goes over NCCL: rows from device to device, beside the messages that
announce them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, Work

from isotherm.actors.links.protocol import LinkError
from isotherm.actors.links.wire import wait
from isotherm.cluster.errors import one_line


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
        self._sent: tuple[Work, Tensor] | None = None  # under way until the peer's next message

    def send(self, rows: Tensor) -> None:
        """Start sending, after what the current stream has still to compute of `rows`."""
        if rows.numel():
            try:
                self._sent = self._group.send([rows], self._peer, 0), rows
            except RuntimeError as error:
                raise LinkError(one_line(error)) from None

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
                raise LinkError(one_line(error)) from None
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

    def _wait(self, work: Work) -> None:
        """On the host: a peer that has died would hang the device for ever. NCCL's own wait sleeps for a millisecond at
        a time, which is too long."""
        try:
            if self._receiving is None:
                wait(work, timedelta(seconds=self._timeout))
                return
            deadline = time.monotonic() + self._timeout
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise LinkError(f"the peer announced rows and sent none for {self._timeout:g} s")
                time.sleep(0)  # lets other threads run
        except (LinkError, RuntimeError) as error:
            self._abort()
            raise LinkError(one_line(error)) from None


def open_data_lane(
    store_host: str, store_port: int, prefix: str, rank: int, *, device: torch.device, meeting: float, timeout: float
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
        raise LinkError(f"no link could be made over NCCL: {one_line(error)}") from None
    lane._timeout = timeout
    return lane
