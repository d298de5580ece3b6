"""The names of the event stream, and what they hold."""

from __future__ import annotations

import numpy as np

from isotherm.cluster.observe import rows
from isotherm.cluster.placement.table import Placement

PLACEMENT = Placement(4, (3, 4), ((("g0",), ("g1",)), (("g0", "g1"), ("g1",))))


def test_a_status():
    status = {
        "controller": {"phase": "serving", "uptime_seconds": 5.0},
        "model": {"id": "m"},
        "placement_version": 4,
        "workers": [{"id": "a", "x": 1, "load": {"heat": 2.0, "busy": 0.4}}, {"id": "b", "load": None}],
        "nodes": [{"id": "n"}],
        "operation": {},
        "autoscaler": {},
    }
    found = rows.status_rows(status, [{"name": "a", "node": "n", "busy": 0.5}])
    assert found["cluster"] == {"": {"controller": {"phase": "serving"}, "model": {"id": "m"}, "placement_version": 4}}
    assert found["worker/"] == {
        "a": {"id": "a", "x": 1, "load": {"heat": 2.0, "busy": 0.5}},
        "b": {"id": "b", "load": None},
    }
    assert found["node/"] == {"n": {"id": "n"}}


def test_places_and_heat():
    assert rows.placement_rows(PLACEMENT, {(4, 1), (4, 0)})["layer/"] == {
        "3": {"layer": 3, "holders": [["g0"], ["g1"]], "pinned": []},
        "4": {"layer": 4, "holders": [["g0", "g1"], ["g1"]], "pinned": [0, 1]},
    }
    rates = np.array([[1.04, 0.0], [6.0, 1.0]])
    found = rows.heat_rows(PLACEMENT, ["g0", "g1", "g2"], rates, np.array([[1, 2], [3, 4]]), {"s": {"g0": 2.0}})
    assert found["heat/"]["3"] == {"rate": [1.0, 0.0], "rows": [1, 2]}
    assert found["heat/"]["groups"] == {"g0": 1.507, "g1": 1.493, "g2": 0.0}
    assert found["flows"] == {"": {"s": {"g0": 2.0}}}


def test_heat_before_anything_is_known_and_of_another_placement():
    found = rows.heat_rows(PLACEMENT, ["g0"], np.zeros((0, 0)), np.zeros((1, 9)), {})
    assert found["heat/"]["4"] == {"rate": [0.0, 0.0], "rows": [0, 0]} and found["heat/"]["groups"] == {
        "g0": 1.0,
        "g1": 1.0,
    }
    assert rows.heat_rows(Placement(0, (), ()), [], np.zeros((0, 0)), None, {})["heat/"] == {"groups": {}}


def test_what_still_changes_is_copied():
    operations, decision = [{"id": f"op-{i}", "reasons": []} for i in range(60)], {"time": 1.5, "operations": []}
    found = rows.operation_rows(operations)["operation/"]
    report = rows.autoscaler_rows({"mode": "on", "groups": [], "shards": [], "decisions": [decision]})
    operations[-1]["reasons"].append("x")
    decision["operations"].append("y")
    assert list(found) == [f"op-{i}" for i in range(10, 60)] and found["op-59"]["reasons"] == []
    assert report == {"autoscaler": {"": {"mode": "on"}}, "decision/": {"1.500": {"time": 1.5, "operations": []}}}
    assert rows.sample_rows([{"n": 3}]) == {"sample/": {"3": {"n": 3}}}
