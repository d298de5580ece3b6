"""What a controller writes down so that one that comes back can go on: what was committed last, and what was asked for.
Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.errors import named_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.placement.table import Placement

FORMAT = 5
_T = TypeVar("_T")


@dataclass(frozen=True)
class SavedRevision:
    """The workers that have one model and one manifest's values. The placement has version 0 until the first one is
    committed."""

    number: int
    model: str  # directory of the checkpoint
    desired: Desired
    numerics: str  # ClusterNumerics.dump()
    manifest: str  # with the values that its workers have; as JSON

    @property
    def workers(self) -> tuple[str, ...]:
        return (*self.desired.groups, *self.desired.shards)


@dataclass(frozen=True)
class SavedState:
    """Everything else is asked of the workers."""

    serving: SavedRevision
    leaving: SavedRevision | None  # was rolled away, and finishes streams
    numbers: Mapping[str, int]  # role → the next worker's number
    operations: str  # OperationLog.dump()
    autoscaler: str  # AutoscaleLoop.dump()
    manifest: str  # what the front door has; as JSON

    def encode(self) -> bytes:
        """58 layers of 256 experts take some 20 KB."""
        state = {
            "format": FORMAT,
            "serving": _revision_as_json(self.serving),
            "leaving": None if self.leaving is None else _revision_as_json(self.leaving),
            "numbers": dict(self.numbers),
            "operations": self.operations,
            "autoscaler": self.autoscaler,
            "manifest": self.manifest,
        }
        return zlib.compress(json.dumps(state, separators=(",", ":")).encode(), 3)


def _revision_as_json(saved: SavedRevision) -> JSON:
    desired, placement = saved.desired, saved.desired.placement
    groups = placement.groups()
    number = {g: i for i, g in enumerate(groups)}
    return {
        "number": saved.number,
        "model": saved.model,
        "numerics": saved.numerics,
        "manifest": saved.manifest,
        "groups": desired.groups,
        "shards": desired.shards,
        "drained_nodes": sorted(desired.drained),  # Ray's node ids
        "pinned": sorted(desired.pinned),
        "placement": {
            "version": placement.version,
            "layers": placement.layers,
            "groups": groups,
            "holders": [[[number[g] for g in held] for held in experts] for experts in placement.holders],
        },
    }


def _revision(saved: Any) -> SavedRevision:
    p = saved["placement"]
    groups = _texts(p, "groups")
    holders = tuple(tuple(tuple(groups[i] for i in held) for held in experts) for experts in p["holders"])
    desired = Desired(
        _texts(saved, "groups"),
        _texts(saved, "shards"),
        Placement(_typed(p, "version", int), tuple(p["layers"]), holders),
        frozenset(saved["drained_nodes"]),
        frozenset((layer, expert) for layer, expert in saved["pinned"]),
    )
    texts = {name: _typed(saved, name, str) for name in ("model", "numerics", "manifest")}
    return SavedRevision(_typed(saved, "number", int), desired=desired, **texts)


def decode(data: bytes) -> SavedState:
    """What `encode` made. Raises ValueError for anything else."""
    try:
        saved: Any = json.loads(zlib.decompress(data))
        if saved["format"] == FORMAT:
            leaving = None if saved["leaving"] is None else _revision(saved["leaving"])
            numbers, texts = _typed(saved, "numbers", dict), ("operations", "autoscaler", "manifest")
            return SavedState(
                _revision(saved["serving"]), leaving, numbers, **{name: _typed(saved, name, str) for name in texts}
            )
    except (zlib.error, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the saved state is not readable: {named_line(error)}") from error
    raise ValueError(f"the saved state has format {saved['format']}; this version reads {FORMAT}")


def _typed(saved: Any, name: str, kind: type[_T]) -> _T:
    if not isinstance(value := saved[name], kind):
        raise TypeError(f"{name} is {value!r:.80}")
    return value


def _texts(saved: Any, name: str) -> tuple[str, ...]:
    values = _typed(saved, name, list)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} is {values!r:.80}")
    return tuple(values)
