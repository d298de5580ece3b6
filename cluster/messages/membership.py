"""What the controller tells ingress replicas: which shards there are and whether the cluster serves. And what a
controller is told that is not the newest any more."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from isotherm.cluster.errors import IsothermError


class WorkerGoneError(IsothermError, ConnectionError):
    """A worker, or the controller, is not there any more, or cannot be reached."""


class SupersededError(IsothermError, RuntimeError):
    """A newer controller has been started: this one must not act."""


# After which a controller that is asked for a newer membership says that there is none.
UNCHANGED_SECONDS = 30.0


@dataclass(frozen=True)
class ShardLimits:
    """What one attention shard takes, as the manifest that its revision was started with has it."""

    max_model_len: int  # prompt and output of one request
    max_sequences: int = sys.maxsize  # requests that run
    requests: int = sys.maxsize  # that run or wait
    tokens: int = sys.maxsize  # that all of those may have
    hangs_after: float = 15.0  # seconds of silence after which it counts as hung, and is ended; 0: never


@dataclass(frozen=True)
class Membership:
    """One state of the cluster. `version` grows with every change, and from one controller to the next."""

    version: int
    shards: tuple[str, ...]  # names of attention shards that take requests
    not_ready: str | None  # None: serving; else why not
    limits: ShardLimits  # of these shards
    recovering: bool = False  # not ready because every shard was lost; others are on their way
    system_fingerprint: str = ""  # as ClusterNumerics says; empty before the first worker has come
    revision: int = 0  # which one these shards are of, of those that were rolled out one after the other
    # Revision → its shards, which take nothing but what began there: it is about to come, or was rolled away
    others: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
