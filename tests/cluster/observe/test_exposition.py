"""Figures of several processes as text, read by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from isotherm.cluster.messages.figures import Metric, Tally
from isotherm.cluster.observe.exposition import families_of, text

COUNT = Metric("c_total", "How many", labels=("key",))
LEVEL = Metric("l", "How high", "gauge")
SIZES = Metric("s_seconds", "How long", "histogram", bounds=(0.5, 1.0))


def tally(key: str, *sizes: float) -> list:
    found = Tally([COUNT, LEVEL, SIZES])
    found.add(COUNT, (key,))
    found.add(LEVEL, amount=2.5)
    for size in sizes:
        found.observe(SIZES, size)
    return found.read()


def test_one_family_for_a_metric_and_each_process_by_its_label():
    written = text(families_of("ingress", {"one": tally('a"b', 0.1, 0.6, 7.0), "two": tally("c")}))
    families = {family.name: family for family in text_string_to_metric_families(written)}
    assert {name: family.type for name, family in families.items()} == {
        "c": "counter", "l": "gauge", "s_seconds": "histogram",
    }  # fmt: skip
    samples = {(s.name, *sorted(s.labels.items())): s.value for f in families.values() for s in f.samples}
    assert samples["c_total", ("ingress", "one"), ("key", 'a"b')] == 1
    assert samples["l", ("ingress", "two")] == 2.5
    buckets = [samples["s_seconds_bucket", ("ingress", "one"), ("le", le)] for le in ("0.5", "1.0", "+Inf")]
    assert buckets == [1, 2, 3], "each counts all that are smaller too"
    assert samples["s_seconds_sum", ("ingress", "one")] == 7.7 and samples["s_seconds_count", ("ingress", "one")] == 3
    assert samples["s_seconds_count", ("ingress", "two")] == 0
