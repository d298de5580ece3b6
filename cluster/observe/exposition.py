"""Figures of many processes as Prometheus' text: one family for a metric, each process by a label of its own. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from isotherm.cluster.messages import figures as of
from isotherm.cluster.messages.figures import Buckets, Figures


class _Collector:
    def __init__(self, families: Iterable[Metric]):
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def text(families: Iterable[Metric]) -> str:
    """Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(families))
    return generate_latest(registry).decode()


def families_of(label: str, by_process: Mapping[str, Figures]) -> list[Metric]:
    """What several processes have counted, each under its name as `label`; families in the order of their coming."""
    found: dict[of.Metric, Metric] = {}
    for process, figures in by_process.items():
        for family in figures:
            metric = found.get(family.metric)
            if metric is None:
                metric = found[family.metric] = _new_family(family.metric, label)
            for labels, value in family.values.items():
                _add(metric, family.metric, [process, *labels], value)
    return list(found.values())


def _new_family(metric: of.Metric, label: str) -> Metric:
    kinds: dict[str, Any] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    family: Metric = kinds[metric.kind](metric.name, metric.help, labels=[label, *metric.labels])
    return family


def _add(family: Metric, metric: of.Metric, labels: list[str], value: float | Buckets) -> None:
    if isinstance(value, Buckets):
        ends = [*map(floatToGoString, metric.bounds), "+Inf"]
        buckets = list(zip(ends, map(float, accumulate(value.counts)), strict=True))
        family.add_metric(labels, buckets=buckets, sum_value=value.total)  # type: ignore[attr-defined]
    else:
        family.add_metric(labels, value)  # type: ignore[attr-defined]
