"""What GET /metrics tells Prometheus: a bounded number of series, by worker, and for the few hottest experts only.
Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def render(snapshot: Snapshot) -> str:
    """Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))  # type: ignore[arg-type]
    return generate_latest(registry).decode()


class _Collector:
    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        s = self._snapshot
        shards: dict[str, tuple[str, list[float]]] = {
            "requests_running": ("Requests that hold KV blocks", [x.running for x in s.shards]),
            "requests_waiting": ("Requests that wait to be admitted", [x.waiting for x in s.shards]),
            "kv_used_ratio": ("Fraction of the KV blocks in use", [x.kv_used for x in s.shards]),
            "first_token_seconds": (
                "Time from a request's arrival to its first token, decayed mean",
                [x.first_token_seconds for x in s.shards],
            ),
            "tokens_per_second": ("Tokens generated, decayed", [x.tokens_per_second for x in s.shards]),
            "steps_per_second": ("Steps computed, decayed", [x.steps_per_second for x in s.shards]),
        }
        groups: dict[str, tuple[str, list[float]]] = {
            "busy_ratio": ("Fraction of the time spent computing, decayed", [x.busy for x in s.groups]),
            "held_ratio": (
                "Fraction of the time that messages were held for others to join, decayed",
                [x.held for x in s.groups],
            ),
            "waited_ratio": (
                "Fraction of the time that shards could only wait for it, their sum, decayed",
                [x.waited for x in s.groups],
            ),
            "rows_per_second": ("Rows computed, decayed", [x.rows_per_second for x in s.groups]),
            "batch_rows": ("Rows of a computation, decayed mean", [x.batch for x in s.groups]),
            "experts": ("Experts held", [x.experts for x in s.groups]),
            "weight_bytes": ("Bytes of weights held", [x.weight_bytes for x in s.groups]),
        }
        for name, (words, values) in shards.items():
            yield _gauges(
                f"isotherm_shard_{name}",
                words,
                ["shard"],
                (([x.name], v) for x, v in zip(s.shards, values, strict=True)),
            )
        for name, (words, values) in groups.items():
            yield _gauges(
                f"isotherm_group_{name}",
                words,
                ["group"],
                (([x.name], v) for x, v in zip(s.groups, values, strict=True)),
            )
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
