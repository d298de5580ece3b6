"""GET /metrics: that Prometheus' own parser reads it, and that the number of series is bounded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from isotherm.actors.attention.step_figures import StepFigures
from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.observe.metrics import HOTTEST, Snapshot, hottest, render
from isotherm.cluster.observe.request_figures import RequestFigures

GROUP = GroupLoad("expert-0", "node", 0.5, 0.01, 0.2, 4000.0, 12.5, 100, 1 << 30)
SHARD = ShardLoad("attention-0", "node", 16, 3, 128, 0.4, 0.25, 140.0, 9.0)
SNAPSHOT = Snapshot(
    [GROUP, replace(GROUP, name="expert-1", busy=0.1)],
    [SHARD],
    {"expert-0": 30.0, "expert-1": 10.0},
    (1, 2),
    np.zeros((2, 4)),
    3,
    {("copies", "done"): 2},
    {("api", "done"): 1, ("autoscaler", "done"): 2},
    operations_open=1,
    links={"made_anew": 4},
    workers={("expert", "wanted"): 3, ("expert", "alive"): 2},
    lost={"expert": 1},
    ready=False,
    of_shards={"attention-0": StepFigures().read(SimpleNamespace(preemptions=7, looked_up=9, found=8))},
    of_ingress={"one": RequestFigures().read()},
)


def samples(snapshot: Snapshot) -> dict[tuple, float]:
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(render(snapshot))
        for s in family.samples
    }


def test_prometheus_reads_it():
    found = samples(SNAPSHOT)
    assert found["isotherm_group_busy_ratio", ("group", "expert-1")] == 0.1
    assert found["isotherm_group_heat_ratio", ("group", "expert-0")] == 1.5
    assert found["isotherm_shard_requests_waiting", ("shard", "attention-0")] == 3
    assert found["isotherm_shard_first_token_seconds", ("shard", "attention-0")] == 0.25
    assert found["isotherm_autoscaler_decisions_total", ("kind", "copies"), ("result", "done")] == 2
    assert found["isotherm_operations_total", ("origin", "api"), ("phase", "done")] == 1
    assert found[("isotherm_placement_version",)] == 3
    assert found[("isotherm_ready",)] == 0 and found[("isotherm_controller_reachable",)] == 1
    assert found[("isotherm_operations_open",)] == 1
    assert found["isotherm_link_repairs_total", ("result", "made_anew")] == 4
    assert found["isotherm_workers_wanted", ("role", "expert")] == 3
    assert found["isotherm_workers_alive", ("role", "expert")] == 2
    assert found["isotherm_workers_lost_total", ("role", "expert")] == 1
    assert found["isotherm_preemptions_total", ("shard", "attention-0")] == 7
    assert found["isotherm_step_seconds_bucket", ("le", "+Inf"), ("shard", "attention-0")] == 0
    assert found["isotherm_streams_moved_total", ("ingress", "one")] == 0


def test_every_family_has_a_help_text_and_a_type():
    for family in text_string_to_metric_families(render(SNAPSHOT)):
        assert family.documentation and family.type in ("gauge", "counter", "histogram")


def test_only_the_hottest_experts_have_a_series():
    rates_LE = np.random.default_rng(0).random((58, 256))
    found = samples(replace(SNAPSHOT, layers=tuple(range(3, 61)), rates_LE=rates_LE))
    series = {key[1:]: value for key, value in found.items() if key[0] == "isotherm_hot_expert_rows_per_second"}
    assert len(series) == HOTTEST and max(series.values()) == rates_LE.max()
    assert len(found) < 250


def test_the_hottest_in_order():
    rates_LE = np.array([[0.0, 5.0], [7.0, 0.0]])
    assert hottest((1, 2), rates_LE, 3) == [(2, 0, 7.0), (1, 1, 5.0)]
    assert hottest((), np.zeros((0, 0)), 3) == []


def test_a_cluster_that_has_just_started_has_metrics():
    assert samples(Snapshot([], [], {}, (), np.zeros((0, 0)), 0, {}, {}))[("isotherm_placement_version",)] == 0
