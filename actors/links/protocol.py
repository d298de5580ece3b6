"""What a link between an attention shard and an expert group is, whatever carries it: messages, both ends, how
they are made, and errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.messages.workers import Meeting


class ExpertNotHeldError(IsothermError, LookupError):
    """A row came for an expert that this group does not hold: the sender's placement is not this group's."""


@dataclass(frozen=True)
class Dispatch:
    """Rows for experts of one layer. Pair p runs row x[rows[p]] through an expert; pairs are sorted by expert, and
    pairs offsets[a] … offsets[a+1]-1 belong to experts[a]."""

    layer: int
    placement_version: int
    x_UD: Tensor
    rows_P: np.ndarray  # int32
    experts_A: np.ndarray  # int32
    offsets_A1: np.ndarray  # int32


DTYPES = (torch.float32, torch.bfloat16)


class Link(Protocol):
    """The shard's end of a link to one group. One message is under way at a time."""

    kind: str

    def send(self, message: Dispatch) -> None:
        """Start one exchange. Raises LinkError."""

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        """Outputs [P, D] of the message sent last. `progress` is called when a part of them has come, after which the
        group may be silent for as long again. Raises LinkError, or ExpertNotHeldError as the group said it."""

    def in_step(self, inside: bool) -> None:
        """Tell the group whether this shard is inside a step, so that others' messages may wait for its own. Never
        raises."""

    def close(self) -> None:
        """Tell the peer and let go. Never raises."""


@runtime_checkable
class NativeLink(Link, Protocol):
    """A link whose end is in native code, which may use it for a while instead of `send` and `receive`."""

    in_use: threading.Lock  # held meanwhile

    @property
    def end(self) -> int | None:
        """The end (`iso_end_open`); None once the link was closed."""

    def expect(self, pairs: int, width: int, dtype: torch.dtype) -> None:
        """Native code has sent a message: `receive` is to give its outputs [pairs, width]."""


class LinkError(IsothermError, ConnectionError):
    """The peer died, hangs, or broke the protocol: the link is of no more use."""


class GroupFailedError(LinkError):
    """The group answered that it failed; the link itself is whole."""


class ServerLink(Protocol):
    """The group's end of a link that the loop in Python serves: one thread receives while another answers."""

    kind: str

    def receive(self) -> tuple[int, Dispatch] | None:
        """Wait for the next dispatch, as long as it takes → (sequence number, message), or None when the shard has
        closed the link. Raises LinkError when the shard is gone."""

    def reply(self, sequence: int, output_PD: Tensor) -> None:
        """Outputs of a message. Raises LinkError."""

    def refuse(self, sequence: int, error: Exception) -> None:
        """Say why there is no output. Raises LinkError."""


# --- how the two ends are made --------------------------------------------------------------------


@dataclass(frozen=True)
class LinkEnd:
    """What a worker says of itself to whatever carries its links."""

    host: str  # its address, for carriers that listen
    device: torch.device  # where rows come from and outputs go to
    dtype: torch.dtype  # of both
    width: int  # elements of a row
    top_k: int  # experts that a row may go to
    timeout: float  # seconds that the peer may stay silent before it counts as lost


@dataclass(frozen=True)
class PeerDescriptors:
    """What one end of a link in shared memory has of the other: its file, and the socket between them. Whoever holds
    this owns both."""

    file: int
    socket: int

    def close(self) -> None:
        os.close(self.file)
        os.close(self.socket)


class ServesLinks(Protocol):
    """Serves any kind of link."""

    def attach(self, shard: str, link: ServerLink) -> None: ...


class ServesSharedMemory(Protocol):
    """Serves links in shared memory without Python."""

    @property
    def bell(self) -> int:
        """The file that shards are given to ring."""

    def attach(self, shard: str, peer: PeerDescriptors) -> None: ...


@dataclass(frozen=True)
class Loops:
    """What serves a group's experts. Which of the two a link is served by is its carrier's choice."""

    python: ServesLinks
    native: ServesSharedMemory | None  # None: the kernels are not native, or this system has no shared memory


class Carrier(Protocol):
    """One kind of link: how its ends are made. Both block until the peer has come, at most the meeting's timeout."""

    @property
    def kind(self) -> str:
        """As `Meeting.kind` says it, and the rule of cluster/control/link_choice.py."""

    def unavailable_reason(self) -> str | None:
        """Why this process can have no link of this kind, whoever the peer is."""

    def open(self, meeting: Meeting, end: LinkEnd, most_rows: int) -> Link:
        """The shard's end, for messages of mostly up to `most_rows` rows. Raises LinkError."""

    def accept(self, meeting: Meeting, end: LinkEnd, shard: str, loops: Loops) -> None:
        """The group's end: meet the shard and have one of the loops serve it. Raises LinkError."""
