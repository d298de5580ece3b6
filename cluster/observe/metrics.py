"""What GET /metrics tells Prometheus: a bounded number of series, by worker, and for the few hottest experts only.
Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad

HOTTEST = 10  # experts that have a series


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment. `heat`: rows per second of each group by the placement in force. `decisions` and
    `operations` count by (kind, result) and (origin, phase)."""

    groups: Sequence[GroupLoad]
    shards: Sequence[ShardLoad]
    heat: Mapping[str, float]
    layers: Sequence[int]
    rates_LE: np.ndarray  # rows per second
    placement_version: int
    decisions: Mapping[tuple[str, str], int]
    operations: Mapping[tuple[str, str], int]


# By the end of the metric's name: help, and the figure.
SHARD_GAUGES: dict[str, tuple[str, Callable[[ShardLoad], float]]] = {
    "requests_running": ("Requests that hold KV blocks", lambda x: x.running),
    "requests_waiting": ("Requests that wait to be admitted", lambda x: x.waiting),
    "kv_used_ratio": ("Fraction of the KV blocks in use", lambda x: x.kv_used),
    "first_token_seconds": (
        "Time from a request's arrival to its first token, decayed mean",
        lambda x: x.first_token_seconds,
    ),
    "tokens_per_second": ("Tokens generated, decayed", lambda x: x.tokens_per_second),
    "steps_per_second": ("Steps computed, decayed", lambda x: x.steps_per_second),
}
GROUP_GAUGES: dict[str, tuple[str, Callable[[GroupLoad], float]]] = {
    "busy_ratio": ("Fraction of the time spent computing, decayed", lambda x: x.busy),
    "held_ratio": ("Fraction of the time that messages were held for others to join, decayed", lambda x: x.held),
    "waited_ratio": (
        "Fraction of the time that shards could only wait for it, their sum, decayed",
        lambda x: x.waited,
    ),
    "rows_per_second": ("Rows computed, decayed", lambda x: x.rows_per_second),
    "batch_rows": ("Rows of a computation, decayed mean", lambda x: x.batch),
    "experts": ("Experts held", lambda x: x.experts),
    "weight_bytes": ("Bytes of weights held", lambda x: x.weight_bytes),
}


def render(snapshot: Snapshot) -> str:
    """Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))
    return generate_latest(registry).decode()


class _Collector:
    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        s = self._snapshot
        for name, (words, of_shard) in SHARD_GAUGES.items():
            yield _gauges(f"isotherm_shard_{name}", words, ["shard"], (([x.name], of_shard(x)) for x in s.shards))
        for name, (words, of_group) in GROUP_GAUGES.items():
            yield _gauges(f"isotherm_group_{name}", words, ["group"], (([x.name], of_group(x)) for x in s.groups))
        mean = sum(s.heat.values()) / max(len(s.heat), 1)
        heat = (([name], rows / mean if mean else 1.0) for name, rows in s.heat.items())
        yield _gauges(
            "isotherm_group_heat_ratio",
            "Rows routed to the group / the mean group's, all layers, decayed",
            ["group"],
            heat,
        )
        yield _gauges(
            "isotherm_hot_expert_rows_per_second",
            f"Rows routed to each of the {HOTTEST} hottest experts, decayed",
            ["layer", "expert"],
            (([str(layer), str(expert)], rows) for layer, expert, rows in hottest(s.layers, s.rates_LE, HOTTEST)),
        )
        yield _gauges(
            "isotherm_placement_version", "Version of the placement in force", [], [([], s.placement_version)]
        )
        yield _counters("isotherm_autoscaler_decisions", "Decisions of the autoscaler", ["kind", "result"], s.decisions)
        yield _counters("isotherm_operations", "Operations, of those remembered", ["origin", "phase"], s.operations)


def hottest(layers: Sequence[int], rates_LE: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """(layer, expert, rows per second), the hottest first; those without rows are left out."""
    order = np.argsort(-rates_LE, axis=None, kind="stable")[:count]
    places = (
        [(int(i), int(e)) for i, e in zip(*np.unravel_index(order, rates_LE.shape), strict=True)]
        if rates_LE.size
        else []
    )
    return [(layers[i], e, float(rates_LE[i, e])) for i, e in places if rates_LE[i, e] > 0]


def _gauges(name: str, words: str, labels: list[str], samples: Iterable[tuple[list[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _counters(name: str, words: str, labels: list[str], counts: Mapping[tuple[str, str], int]) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for values, number in sorted(counts.items()):
        family.add_metric(list(values), number)
    return family
