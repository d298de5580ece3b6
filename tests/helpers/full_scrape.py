"""A scrape of a cluster in which every metric has a sample, made of what processes really count; and what is in one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from request_records import record

from isotherm.actors.attention.step_figures import StepFigures
from isotherm.actors.experts.expert_loads import PEER, ExpertLoads
from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.messages.figures import Family
from isotherm.cluster.observe.ingress import OPEN
from isotherm.cluster.observe.metrics import Snapshot, render
from isotherm.cluster.observe.request_figures import RequestFigures


def full_scrape() -> str:
    requests = RequestFigures()
    requests.take(record())
    requests.take(record(error="generation_failed", status=500))
    scheduler = SimpleNamespace(preemptions=0, looked_up=0, found=0)
    loads = ExpertLoads(None, "auto")  # type: ignore[arg-type]
    loads.note("expert-1", PEER, 1, 2, 3.0, 4.0)
    return render(
        Snapshot(
            groups=[GroupLoad("expert-0", "node", 0.5, 0.01, 0.2, 4000.0, 12.5, 100, 1 << 30)],
            shards=[ShardLoad("attention-0", "node", 16, 3, 128, 0.4, 0.25, 140.0, 9.0)],
            heat={"expert-0": 10.0},
            layers=(1,),
            rates_LE=np.ones((1, 2)),
            placement_version=3,
            decisions={("copies", "done"): 2},
            operations={("api", "done"): 1},
            links={"made_anew": 1},
            workers={("expert", "wanted"): 1, ("expert", "alive"): 1},
            lost={"expert": 0},
            of_shards={"attention-0": StepFigures().read(scheduler)},  # type: ignore[arg-type]
            of_groups={"expert-0": loads.figures()},
            of_ingress={"one": [*requests.read(), Family(OPEN, {(): 1})]},
        )
    )


def labels_of_series(scrape: str) -> dict[str, set[str]]:
    """By the name of a series (with _bucket, _total and so on) its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def families_of_scrape(scrape: str) -> dict[str, str]:
    """By the name of a metric, as it stands behind # TYPE, its type."""
    lines = [line.split() for line in scrape.splitlines() if line.startswith("# TYPE ")]
    return {name: kind for _, _, name, kind in lines}
