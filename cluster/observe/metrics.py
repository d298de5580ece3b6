"""What GET /metrics tells Prometheus of the whole cluster: a bounded number of series, by worker, by ingress replica,
and for the few hottest experts only. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from isotherm.cluster.autoscale.rates import GroupLoad, ShardLoad
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.observe import exposition
from isotherm.cluster.placement.report import heat_ratios

HOTTEST = 10  # experts that have a series


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment. `heat`: rows per second of each group by the placement in force. `decisions` and
    `operations` count by (kind, result) and, of those that have ended, (origin, phase); `links` what became of links
    that had failed; `workers` by (role, "wanted" or "alive"), and `lost` by role. `of_shards`, `of_groups` and
    `of_ingress` are what these count themselves."""

    groups: Sequence[GroupLoad]
    shards: Sequence[ShardLoad]
    heat: Mapping[str, float]
    layers: Sequence[int]
    rates_LE: np.ndarray  # rows per second
    placement_version: int
    decisions: Mapping[tuple[str, str], int]
    operations: Mapping[tuple[str, str], int]
    operations_open: int = 0
    links: Mapping[str, int] = field(default_factory=dict)
    links_failed: int = 0
    workers: Mapping[tuple[str, str], int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    ready: bool = True
    controller_restarts: int = 0
    of_shards: Mapping[str, Figures] = field(default_factory=dict)
    of_groups: Mapping[str, Figures] = field(default_factory=dict)
    of_ingress: Mapping[str, Figures] = field(default_factory=dict)


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
    return exposition.text(families(snapshot))


def render_alone(of_ingress: Mapping[str, Figures]) -> str:
    """What an ingress replica can say while there is no controller to ask."""
    return exposition.text([_reachable(False), *exposition.families_of("ingress", of_ingress)])


def families(s: Snapshot) -> list[Metric]:
    """Every metric there is, in an order that stays."""
    return [
        _reachable(True),
        *exposition.families_of("ingress", s.of_ingress),
        *exposition.families_of("shard", s.of_shards),
        *exposition.families_of("group", s.of_groups),
        *(_gauges(f"isotherm_shard_{name}", words, ["shard"], (([x.name], of_shard(x)) for x in s.shards))
          for name, (words, of_shard) in SHARD_GAUGES.items()),
        *(_gauges(f"isotherm_group_{name}", words, ["group"], (([x.name], of_group(x)) for x in s.groups))
          for name, (words, of_group) in GROUP_GAUGES.items()),
        *_of_experts(s),
        *_of_control(s),
    ]  # fmt: skip


def _reachable(yes: bool) -> Metric:
    words = "1 where the controller answers; without it there are the ingress replica's own figures alone"
    return _gauges("isotherm_controller_reachable", words, [], [([], float(yes))])


def _of_experts(s: Snapshot) -> list[Metric]:
    heat = [([name], ratio) for name, ratio in heat_ratios(s.heat).items()]
    hot = [([str(layer), str(expert)], rows) for layer, expert, rows in hottest(s.layers, s.rates_LE, HOTTEST)]
    return [
        _gauges(
            "isotherm_group_heat_ratio",
            "Rows routed to the group / the mean group's, all layers, decayed",
            ["group"],
            heat,
        ),
        _gauges(
            "isotherm_hot_expert_rows_per_second",
            f"Rows routed to each of the {HOTTEST} hottest experts, decayed",
            ["layer", "expert"],
            hot,
        ),
        _gauges("isotherm_placement_version", "Version of the placement in force", [], [([], s.placement_version)]),
    ]


def _of_control(s: Snapshot) -> list[Metric]:
    decisions, operations = s.decisions.items(), s.operations.items()
    wanted, alive = ({role: n for (role, kind), n in s.workers.items() if kind == of} for of in ("wanted", "alive"))
    return [
        _gauges("isotherm_ready", "1 where requests can be served", [], [([], float(s.ready))]),
        _gauges("isotherm_workers_wanted", "Workers that there are to be", ["role"], _by(wanted)),
        _gauges("isotherm_workers_alive", "Workers that there are", ["role"], _by(alive)),
        _counters("isotherm_workers_lost", "Workers that died or hung", ["role"], _by(s.lost)),
        _counters("isotherm_autoscaler_decisions", "Decisions of the autoscaler", ["kind", "result"], decisions),
        _counters("isotherm_operations", "Operations that have ended", ["origin", "phase"], operations),
        _gauges("isotherm_operations_open", "Operations that are under way or wait", [], [([], s.operations_open)]),
        _counters("isotherm_link_repairs", "What became of links that had failed", ["result"], _by(s.links)),
        _gauges("isotherm_links_failed", "Links that are of no use now", [], [([], s.links_failed)]),
        _gauges("isotherm_controller_restarts", "Times that the controller was started again", [],
                [([], s.controller_restarts)]),
    ]  # fmt: skip


def _by(counts: Mapping[str, int]) -> list[tuple[list[str], int]]:
    return [([name], count) for name, count in sorted(counts.items())]


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


def _counters(name: str, words: str, labels: list[str], counts: Iterable[tuple[Sequence[str], int]]) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for values, number in sorted(counts):
        family.add_metric(list(values), number)
    return family
