"""What a link between an attention shard and an expert group is, whatever carries it: messages, both ends,
and errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ExpertNotHeldError(LookupError):
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

    def receive(self) -> Tensor:
        """Outputs [P, D] of the message sent last. Raises LinkError, or ExpertNotHeldError as the group said it."""

    def in_step(self, inside: bool) -> None:
        """Tell the group whether this shard is inside a step, so that others' messages may wait for its own. Never
        raises."""

    def close(self) -> None:
        """Tell the peer and let go. Never raises."""


class LinkError(ConnectionError):
    """The peer died, hangs, or broke the protocol: the link is of no more use."""


class GroupFailedError(LinkError):
    """The group answered that it failed; the link itself is whole."""


class ServerLink(Protocol):
    """The group's end of a link."""

    kind: str

    def receive(self) -> tuple[int, Dispatch] | None: ...

    def reply(self, sequence: int, output_PD: Tensor) -> None: ...

    def refuse(self, sequence: int, error: Exception) -> None: ...
