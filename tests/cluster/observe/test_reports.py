"""What ingress replicas have reported: the newest of each, and nothing of one that is gone."""

from __future__ import annotations

from isotherm.cluster.observe.reports import SILENCE, Reports


def test_the_newest_report_of_each_replica_counts_until_it_falls_silent():
    now = 0.0
    reports = Reports(lambda: now)
    reports.take("two", ["b"], {"running": []})  # type: ignore[list-item]
    reports.take("one", ["a"])  # type: ignore[list-item]
    now = 1.0
    reports.take("one", ["a2"], {"running": [1]})  # type: ignore[list-item]
    reports.take("one", ["a3"])  # type: ignore[list-item]
    assert reports.figures() == {"one": ["a3"], "two": ["b"]}
    assert reports.requests() == {"one": {"running": [1]}, "two": {"running": []}}
    now = SILENCE + 0.5
    assert reports.figures() == {"one": ["a3"]} and reports.requests() == {"one": {"running": [1]}}
