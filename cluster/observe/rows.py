"""The cluster as the named values of its event stream (cluster/messages/feed.py): which names there are, and what each
holds. Pure. What still changes where it comes from is copied, for a value that is told must not change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy

import numpy as np

from isotherm.cluster.jsontypes import JSON, JSONValue
from isotherm.cluster.placement.report import group_rows, heat_ratios
from isotherm.cluster.placement.table import Placement

RECENT = 50  # operations and decisions that the stream has

Rows = dict[str, dict[str, JSONValue]]  # by prefix, then by the rest of the name


def status_rows(status: JSON, loads: Iterable[JSON]) -> Rows:
    """`cluster`, and one value for each worker and node. `loads`: decayed rates of workers, by `name`, which are put to
    those that the status has of them."""
    by_name = {load["name"]: {k: v for k, v in load.items() if k not in ("name", "node")} for load in loads}
    parts = ("workers", "nodes", "operation", "autoscaler")
    head = {name: value for name, value in status.items() if name not in parts}
    head["controller"] = {k: v for k, v in head.get("controller", {}).items() if k != "uptime_seconds"}
    workers = {
        w["id"]: w | ({"load": {**(w.get("load") or {}), **by_name[w["id"]]}} if w["id"] in by_name else {})
        for w in status["workers"]
    }
    return {"cluster": {"": head}, "worker/": workers, "node/": {n["id"]: n for n in status["nodes"]}}


def placement_rows(placement: Placement, pinned: Collection[tuple[int, int]]) -> Rows:
    """`layer/N` of each MoE layer: who holds its experts, and of which of these an operator has set the copies."""
    out: dict[str, JSONValue] = {}
    for layer, experts in zip(placement.layers, placement.holders, strict=True):
        pins = sorted(expert for at, expert in pinned if at == layer)
        out[str(layer)] = {"layer": layer, "holders": [list(held) for held in experts], "pinned": pins}
    return {"layer/": out}


def heat_rows(
    placement: Placement,
    groups: Sequence[str],
    rates_LE: np.ndarray,
    rows_LE: np.ndarray | None,
    flows: Mapping[str, Mapping[str, float]],
) -> Rows:
    """`heat/N` of each MoE layer: the experts' rows per second, decayed, and rows since the start. `heat/groups`: each
    group's rate / the mean group's. `flows`: rows per second from each shard to each group."""
    shape = placement.shape
    rates_LE = rates_LE if rates_LE.shape == shape else np.zeros(shape)
    rows_LE = rows_LE if rows_LE is not None and rows_LE.shape == shape else np.zeros(shape, dtype=np.int64)
    out: dict[str, JSONValue] = {
        str(layer): {"rate": rates, "rows": rows}
        for layer, rates, rows in zip(placement.layers, rates_LE.round(1).tolist(), rows_LE.tolist(), strict=True)
    }
    of_groups = dict.fromkeys(groups, 0.0) | group_rows(placement, rates_LE)
    out["groups"] = {g: round(ratio, 3) for g, ratio in heat_ratios(of_groups).items()}
    return {"heat/": out, "flows": {"": {shard: dict(to) for shard, to in flows.items()}}}


def operation_rows(operations: Sequence[JSON]) -> Rows:
    return {"operation/": {operation["id"]: deepcopy(operation) for operation in operations[-RECENT:]}}


def autoscaler_rows(report: JSON) -> Rows:
    """`autoscaler`, and one value for each decision, by the moment at which it was made."""
    head = {name: value for name, value in report.items() if name not in ("decisions", "groups", "shards")}
    decisions = {f"{d['time']:.3f}": deepcopy(d) for d in report["decisions"][-RECENT:]}
    return {"autoscaler": {"": head}, "decision/": decisions}


def sample_rows(samples: Iterable[JSON]) -> Rows:
    return {"sample/": {str(sample["n"]): sample for sample in samples}}
