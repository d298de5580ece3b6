"""What workers are told when they are started, and what they say of where they are and of their links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from isotherm.cluster.logs import LogFormat, LogLevel
from isotherm.cluster.messages.copies import CopyFrom
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.weight_choice import WeightChoice

ATTENTION, EXPERT = "attention", "expert"  # roles of workers, whose names are "attention-0", "expert-12"
ROLES = {ATTENTION: "attention shard", EXPERT: "expert group"}  # in words


def role_of(worker: str) -> str:
    return worker.rpartition("-")[0]


def number_of(worker: str) -> int:
    return int(worker.rpartition("-")[2])


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What every worker is told when it is started."""

    id: str
    model_path: Path
    device: str  # cpu | cuda
    dtype: str
    kv_cache_dtype: KvCacheDtype = "auto"
    weights: WeightChoice
    kernels: str
    isa: str = "auto"  # of native kernels: auto | amx | avx512 | avx2 | generic
    threads: int | None  # compute threads; None: its share of the node's cores, or of its limit of CPU time
    link_timeout: float  # seconds
    gather_window: float  # in layer times; see LinkSection
    speculation: str = "off"  # auto | mtp | ngram | off
    draft_tokens: int = 4  # of a stream in one step, at most
    copy_from: CopyFrom = "auto"  # where experts come from that another group holds
    sharers: int = 1  # workers that share the node's cores, itself among them
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"


@dataclass(frozen=True)
class Meeting:
    """Where the two ends of a new link meet, and of what kind it is. `prefix` is fresh for every attempt."""

    store_host: str  # empty for a kind of link that needs no store
    store_port: int
    prefix: str
    timeout: float  # seconds
    kind: str  # of actors/links/registry.py, as cluster/control/link_choice.py chose it


@dataclass(frozen=True)
class Locality:
    """What a worker says of its place: equal `machine`s share memory. `unable` says of each kind of link that this
    worker can have with nobody why that is. `device`: cpu or cuda, where its rows are; `gpu`: which one that is, by a
    name that no other has."""

    machine: str
    unable: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    gpu: str | None = None


@dataclass(frozen=True)
class LinkFailure:
    """What an attention shard says of a link that has failed. `number`: it is the shard's n-th link to that group, so
    that one that fails again, as soon as it was made anew, is told from one that has not been mended yet."""

    number: int
    reason: str
