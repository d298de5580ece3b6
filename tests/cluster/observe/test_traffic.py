"""The traffic of the last minutes, from made-up meters."""

from __future__ import annotations

import numpy as np
import pytest

from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.observe import traffic
from isotherm.cluster.observe.traffic import Traffic
from isotherm.cluster.placement.table import Placement

PLACEMENT = Placement(1, (3, 4), ((("g0",), ("g1",)), (("g0", "g1"), ("g1",))))


def shard(tokens: int, rows: list[list[int]], waiting: int = 0, first: float | None = None) -> ShardMeter:
    rows_LE = np.array(rows, dtype=np.int64)
    return ShardMeter(2, waiting, 8, 0.25, tokens, tokens // 2, first, 0.125, {}, rows_LE, rows_LE)


def group(rows: int, busy: float) -> GroupMeter:
    return GroupMeter(1, 1, rows, busy, 0.0, 3, 100)


def test_figures_and_flows_between_two_reports():
    seen = Traffic()
    seen.observe({"s": shard(100, [[1, 1], [1, 1]])}, {"g0": group(0, 0.0)}, PLACEMENT, 10.0, 1000.0)
    assert not seen.samples and not seen.flows
    assert seen.rows_LE is not None and seen.rows_LE.tolist() == [[1, 1], [1, 1]]
    shards = {"s": shard(140, [[5, 1], [9, 3]], waiting=4, first=0.5), "new": shard(900, [[0, 0], [0, 8]])}
    seen.observe(shards, {"g0": group(20, 1.0), "g1": group(7, 9.0)}, PLACEMENT, 12.0, 1002.0)
    (sample,) = seen.samples
    assert sample == {
        "n": 1, "time": 1002.0, "tokens_per_second": 20.0, "steps_per_second": 10.0, "rows_per_second": 10.0,
        "running": 4, "waiting": 4, "kv_used": 0.25, "first_token_seconds": 0.5, "busy": 0.5,
    }  # fmt: skip
    # Of layer 3 g0 has 4 rows; of layer 4 it shares 8 with g1, which has 2 more.
    assert seen.flows == {"s": {"g0": 4.0, "g1": 3.0}}
    assert seen.rows_LE.tolist() == [[5, 1], [9, 11]]


def test_a_worker_that_began_anew_and_a_placement_of_another_shape():
    seen = Traffic()
    seen.observe({"s": shard(100, [[9, 9], [9, 9]])}, {}, PLACEMENT, 1.0, 1.0)
    seen.observe({"s": shard(5, [[1, 1], [1, 1]])}, {}, PLACEMENT, 2.0, 2.0)
    assert seen.samples[-1]["tokens_per_second"] == 0.0 and seen.flows == {"s": {}}
    seen.observe({"s": shard(9, [[2, 2], [2, 2]])}, {}, Placement(0, (), ()), 3.0, 3.0)
    assert seen.flows == {"s": {}}


def test_a_bounded_past(monkeypatch):
    seen = Traffic()
    for i in range(1000):
        seen.observe({"s": shard(i, [[i, 0], [0, 0]])}, {}, PLACEMENT, float(i), 5.0 * i)
    times = [sample["time"] for sample in seen.samples]
    assert times[-1] == 4995.0 and times[0] == pytest.approx(4995.0 - traffic.KEPT_SECONDS)
    for i in range(1000):
        seen.observe({}, {}, PLACEMENT, 1000.0 + i, 4995.0)
    assert len(seen.samples) == traffic.KEPT_SAMPLES
