"""Experts that a group can copy from another one instead of reading them: what is offered, and what of it is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CopyFrom = Literal["auto", "peer", "checkpoint"]  # `experts.copy_from` of the manifest
Pair = tuple[int, int]  # layer, expert


@dataclass(frozen=True)
class CopyOffer:
    """A group is ready to hand out what it has packed to whoever shows `key`, which opens one connection."""

    group: str
    tag: str  # of what it packs: only a group with an equal tag has the same bytes
    key: bytes
    address: str | tuple[str, int]  # a name of a Unix socket in the abstract namespace, or host and port


@dataclass(frozen=True)
class CopySource:
    """An offer, and what is to be had of it."""

    offer: CopyOffer
    pairs: tuple[Pair, ...]
