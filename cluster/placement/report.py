"""What GET /admin/experts tells: the load and the holders of every expert, and the heat of every group. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.placement.table import Placement


def group_rows(placement: Placement, rows_LE: np.ndarray) -> dict[str, float]:
    """Rows that come to each group that holds something; those of an expert with several copies are split evenly."""
    out = dict.fromkeys(placement.groups(), 0.0)
    for rows_E, experts in zip(rows_LE.tolist(), placement.holders, strict=True):
        for rows, held in zip(rows_E, experts, strict=True):
            for group in held:
                out[group] += rows / len(held)
    return out


def heat_ratios(rows: Mapping[str, float]) -> dict[str, float]:
    """Each group's rows / the mean group's; 1 where nothing is asked for."""
    mean = sum(rows.values()) / max(len(rows), 1)
    return {group: of_group / mean if mean else 1.0 for group, of_group in rows.items()}


def experts_report(
    placement: Placement, groups: Sequence[str], counts: Sequence[np.ndarray], rates_LE: np.ndarray
) -> JSON:
    """Per layer and expert: `rows` since the start (`counts`: each live shard's, int64 [layers, experts]), `rate` in
    rows per second (decayed), and who holds it. Per group: `groups`, its rows since the start by the placement of now,
    and `heat`, its rate / the mean group's; 1 where nothing is asked for."""
    shape = placement.shape
    total_LE = sum((c for c in counts if c.shape == shape), np.zeros(shape, dtype=np.int64))
    rates_LE = rates_LE if rates_LE.shape == shape else np.zeros(shape)
    layers = [
        {
            "layer": layer,
            "rows": rows,
            "rate": [round(r, 2) for r in rates],
            "copies": [len(h) for h in held],
            "holders": [list(h) for h in held],
        }
        for layer, rows, rates, held in zip(
            placement.layers, total_LE.tolist(), rates_LE.tolist(), placement.holders, strict=True
        )
    ]
    rows, rates = ({g: 0.0 for g in groups} | group_rows(placement, of_LE) for of_LE in (total_LE, rates_LE))
    return {
        "placement_version": placement.version,
        "layers": layers,
        "groups": {g: round(r, 1) for g, r in rows.items()},
        "heat": {g: round(h, 4) for g, h in heat_ratios(rates).items()},
        "rows_per_second": {g: round(r, 1) for g, r in rates.items()},
    }
