"""What a controller writes down so that one that comes back can go on: what was committed last, and what was asked for.
Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isotherm.cluster.placement.table import Placement

FORMAT = 3


@dataclass(frozen=True)
class SavedState:
    """Everything else is asked of the workers. `placement` has version 0 until the first one is committed."""

    groups: tuple[str, ...]
    shards: tuple[str, ...]
    placement: Placement
    drained_nodes: tuple[str, ...]  # Ray's node ids
    pinned: tuple[tuple[int, int], ...]  # (layer, expert) whose number of copies an operator has set
    numbers: Mapping[str, int]  # role → the next worker's number
    operations: str  # OperationLog.dump()
    autoscaler: str  # AutoscaleLoop.dump()
    numerics: str = ""  # ClusterNumerics.dump()

    def encode(self) -> bytes:
        """58 layers of 256 experts take some 20 KB."""
        groups = self.placement.groups()
        number = {g: i for i, g in enumerate(groups)}
        holders = [[[number[g] for g in held] for held in experts] for experts in self.placement.holders]
        placement = {
            "version": self.placement.version,
            "layers": self.placement.layers,
            "groups": groups,
            "holders": holders,
        }
        rest = {
            "format": FORMAT,
            "groups": self.groups,
            "shards": self.shards,
            "drained_nodes": self.drained_nodes,
            "pinned": self.pinned,
            "numbers": dict(self.numbers),
            "operations": self.operations,
            "autoscaler": self.autoscaler,
            "numerics": self.numerics,
        }
        return zlib.compress(json.dumps(rest | {"placement": placement}, separators=(",", ":")).encode(), 3)


def decode(data: bytes) -> SavedState:
    """What `encode` made. Raises ValueError for anything else."""
    try:
        saved: Any = json.loads(zlib.decompress(data))
    except zlib.error as error:
        raise ValueError(f"the saved state is not readable: {error}") from None
    if saved.get("format") != FORMAT:
        raise ValueError(f"the saved state has format {saved.get('format')}; this version reads {FORMAT}")
    p = saved["placement"]
    holders = tuple(tuple(tuple(p["groups"][i] for i in held) for held in experts) for experts in p["holders"])
    placement = Placement(p["version"], tuple(p["layers"]), holders)
    fields: dict[str, Any] = {name: tuple(saved[name]) for name in ("groups", "shards", "drained_nodes")}
    fields |= {name: saved[name] for name in ("numbers", "operations", "autoscaler", "numerics")}
    return SavedState(**fields, placement=placement, pinned=tuple((layer, expert) for layer, expert in saved["pinned"]))
