"""What the controller tells of the whole cluster, made of its parts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.deploy.observatory import Observatory
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.figures import Metric, Tally
from isotherm.cluster.messages.operations import OperationLog, Phase, parse_operation
from isotherm.cluster.placement.table import Placement, contiguous_placement

PLACEMENT = contiguous_placement((1,), 4, ("expert-0", "expert-1"))
SEEN = Metric("isotherm_seen_total", "seen")


class Controller:
    """Its parts, with one group of two that is dead."""

    restarts = 2

    def __init__(self) -> None:
        alive = lambda names: [name for name in names if name != "expert-1"]  # noqa: E731
        self.fleet = SimpleNamespace(
            placement=PLACEMENT, groups={"expert-0": 0, "expert-1": 0}, shards={"attention-0": 0}, alive=alive,
            repair=SimpleNamespace(results={"made_anew": 3, "given_up": 0}, failed={("attention-0", "expert-1"): "x"}),
        )  # fmt: skip
        group = GroupLoad("expert-0", "n", 0.5, 0.0, 0.1, 40.0, 8.0, 2, 100)
        shard = ShardLoad("attention-0", "n", 1, 0, 8, 0.5, 0.25, 10.0, 5.0)
        self.autoscale = SimpleNamespace(
            loads=lambda: ([group], [shard]), rates=lambda: np.array([[3.0, 0.0, 1.0, 0.0]]), counts={},
            figures=lambda: {"attention-0": Tally([SEEN]).read()},
            group_figures=lambda: {},
        )  # fmt: skip
        self.reconfigurer = SimpleNamespace(desired=Desired(("expert-0", "expert-1"), ("attention-0",), PLACEMENT))
        self.operations = OperationLog()
        self.operations.open(parse_operation({"expert_groups": 2}), 1.0)[0].enter(Phase.DONE, 2.0)
        self.operations.open(parse_operation({"expert_groups": 3}), 3.0)

    def not_ready(self) -> str | None:
        return None


def test_a_scrape_has_what_every_part_knows():
    observatory = Observatory(Controller(), parse_manifest({}))  # type: ignore[arg-type]
    observatory.lost("expert-1")
    observatory.take("one", Tally([SEEN]).read(), {"running": []})
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(observatory.metrics())
        for s in family.samples
    }
    assert found["isotherm_workers_wanted", ("role", "expert")] == 2
    assert found["isotherm_workers_alive", ("role", "expert")] == 1
    assert found["isotherm_workers_lost_total", ("role", "expert")] == 1
    assert found["isotherm_workers_lost_total", ("role", "attention")] == 0
    assert found["isotherm_operations_total", ("origin", "api"), ("phase", "done")] == 1
    assert found[("isotherm_operations_open",)] == 1 and found[("isotherm_links_failed",)] == 1
    assert found["isotherm_link_repairs_total", ("result", "made_anew")] == 3
    assert found[("isotherm_controller_restarts",)] == 2 and found[("isotherm_ready",)] == 1
    assert found["isotherm_seen_total", ("shard", "attention-0")] == 0
    assert found["isotherm_group_heat_ratio", ("group", "expert-0")] == 1.5
    assert observatory.requests() == {"one": {"running": []}}


def test_workers_loads_are_the_same_figures():
    loads = Observatory(Controller(), parse_manifest({})).loads()  # type: ignore[arg-type]
    assert loads["attention-0"] == {"tokens_per_second": 10.0, "steps_per_second": 5.0, "first_token_seconds": 0.25}
    assert loads["expert-0"] == {
        "heat": 1.5, "busy": 0.5, "waited": 0.1, "rows_per_second": 40.0, "batch_rows": 8.0,
    }  # fmt: skip
    assert "expert-1" not in loads, "it has not reported"


def test_a_cluster_that_still_starts_has_no_placement_and_can_be_looked_at():
    controller = Controller()
    controller.fleet.placement = Placement(0, (), ())
    controller.autoscale.loads = lambda: ([], [])
    observatory = Observatory(controller, parse_manifest({}))  # type: ignore[arg-type]
    assert observatory.loads() == {} and "isotherm_placement_version 0.0" in observatory.metrics()


def test_a_batch_that_waits_for_storage_is_told_once_whoever_tells_of_it():
    observatory = Observatory(Controller(), parse_manifest({}))  # type: ignore[arg-type]
    assert observatory.waiting() == {"waiting_batches": []}
    one, other = ({"id": f"batch_{i}", "code": "storage_full", "message": "full"} for i in range(2))
    observatory.take("one", Tally([SEEN]).read(), {"running": [], "waiting_batches": [other, one]})
    observatory.take("two", Tally([SEEN]).read(), {"running": [], "waiting_batches": [one]})
    assert observatory.waiting() == {"waiting_batches": [one, other]}
    for name in ("one", "two"):
        observatory.take(name, Tally([SEEN]).read(), {"running": []})
    assert observatory.waiting() == {"waiting_batches": []}
