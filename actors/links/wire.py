"""Headers and bodies over a two-rank process group, and the host memory that bodies lie in.

gloo tells those who wait of a lost peer, but for the message that is on its way at that moment: whoever waits for that
one waits until its time is over. So nobody here waits for a large message first: behind a large body comes a small
message, and that is waited for; and who has sent waits for the answer, not for what was sent to be gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work

from isotherm.actors.links.protocol import LinkError
from isotherm.cluster.errors import one_line

HEADER = 9  # int64s
LARGE = 32 << 10  # bytes; what is smaller the system takes from, or gives to, a process at once or not at all
OF_HEADERS, OF_BODIES, OF_ENDS = 0, 1, 2  # tags
FOREVER = timedelta(days=3650)


def wait(work: Work, timeout: timedelta) -> None:
    """Wait on the host for something that a process group has begun. Raises LinkError."""
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise LinkError(one_line(error)) from None


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


class Wire:
    """Sends and receives (header, body) over one process group."""

    def __init__(
        self, group: ProcessGroupGloo, peer: int, device: torch.device, allocate: Callable[[int], Tensor] | None
    ):
        self._group: Any = group  # torch's stubs leave out send and recv
        self._peer, self._device = peer, device
        self._pending: list[tuple[Work, Tensor]] = []
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
        messages = [(OF_HEADERS, header)]
        if body is not None and nbytes:
            messages.append((OF_BODIES, body))
        if nbytes > LARGE:
            messages.append((OF_ENDS, torch.zeros(1, dtype=torch.int64)))
        try:
            self._pending = [(self._group.send([message], self._peer, tag), message) for tag, message in messages]
        except RuntimeError as error:
            raise LinkError(one_line(error)) from None

    def flush(self, timeout: timedelta) -> None:
        """Wait until what was sent has gone: a body goes when the peer asks for it, so never to one that hangs."""
        pending, self._pending = self._pending, []
        deadline = time.monotonic() + timeout.total_seconds()
        for work, _ in pending:
            wait(work, timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def receive(self, timeout: timedelta, progress: Callable[[], None] = lambda: None) -> tuple[int, list[int], Tensor]:
        """kind, fields, body uint8. `timeout` holds for the header, with what is still being sent before it, and for
        each part of the body anew. `progress` is called when a part has come."""
        header = torch.empty(HEADER, dtype=torch.int64)
        wait(self._begin(header, OF_HEADERS), timeout)
        progress()
        kind, nbytes, *fields = header.tolist()
        body = self._incoming.take(nbytes)
        if nbytes:
            arrives = self._begin(body, OF_BODIES)
            if nbytes > LARGE:
                wait(self._begin(torch.empty(1, dtype=torch.int64), OF_ENDS), timeout)
                progress()
            wait(arrives, timeout)
            progress()
        return kind, fields, body

    def _begin(self, into: Tensor, tag: int) -> Work:
        try:
            work: Work = self._group.recv([into], self._peer, tag)
        except RuntimeError as error:
            raise LinkError(one_line(error)) from None
        return work
