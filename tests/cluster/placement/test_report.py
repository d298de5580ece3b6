from __future__ import annotations

import numpy as np
import pytest

from isotherm.cluster.placement.report import experts_report, group_rows
from isotherm.cluster.placement.table import Placement

PLACEMENT = Placement(7, (1, 3), ((("a",), ("a", "b")), (("b",), ("b",))))
COUNTS = np.array([[10, 4], [0, 6]])


def test_a_copied_experts_rows_are_split():
    assert group_rows(PLACEMENT, COUNTS.astype(float)) == {"a": 12.0, "b": 8.0}


def test_the_report_sums_over_shards_and_names_layers_as_the_model_does():
    report = experts_report(PLACEMENT, ["a", "b", "c"], [COUNTS, COUNTS], COUNTS / 2)
    assert report["placement_version"] == 7
    first, second = report["layers"]
    assert (first["layer"], first["rows"], first["rate"], first["copies"], first["holders"]) == (
        1,
        [20, 8],
        [5.0, 2.0],
        [1, 2],
        [["a"], ["a", "b"]],
    )
    assert (second["layer"], second["rows"]) == (3, [0, 12])
    assert report["groups"] == {"a": 24.0, "b": 16.0, "c": 0.0}
    assert report["heat"] == pytest.approx({"a": 1.8, "b": 1.2, "c": 0.0}) and report["rows_per_second"] == {
        "a": 6.0,
        "b": 4.0,
        "c": 0.0,
    }


def test_without_traffic_all_groups_are_alike():
    report = experts_report(PLACEMENT, ["a", "b"], [np.zeros((0, 0), dtype=np.int64)], np.zeros((2, 2)))
    assert report["heat"] == {"a": 1.0, "b": 1.0} and report["layers"][0]["rows"] == [0, 0]


def test_a_model_without_experts_has_an_empty_report():
    report = experts_report(Placement(1, (), ()), [], [], np.zeros((0, 0)))
    assert report["layers"] == [] and report["heat"] == {}
