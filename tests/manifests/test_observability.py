"""Dashboards and alert rules against what GET /metrics exports. That Prometheus accepts them, and that every panel
shows something, `make test-metrics` shows with a real one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from full_scrape import families_of_scrape, full_scrape, labels_of_series

from isotherm.manifests.observability.dashboards import DASHBOARDS, FOLDER, written

DOCS = Path(__file__).parents[2] / "docs"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
SERIES = labels_of_series(full_scrape()) | {"up": {"job", "instance"}}
WORDS = {"sum", "rate", "max", "by", "le", "and", "histogram_quantile", "increase"}


def panels() -> Iterator[tuple[str, str, str]]:
    """Title, query and legend."""
    for name in DASHBOARDS:
        for panel in json.loads((FOLDER / f"{name}.json").read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"], target["legendFormat"]


def used(query: str) -> tuple[dict[str, set[str]], set[str]]:
    """The series that a query names, each with the labels that it is selected by; and the labels that it groups by."""
    bare = re.sub(r'"[^"]*"', '""', query)
    grouped = {label for names in re.findall(r"\bby \(([^)]*)\)", bare) for label in re.split(r",\s*", names)}
    bare = re.sub(r"\bby \([^)]*\)|\[[^]]*\]", "", bare)
    series: dict[str, set[str]] = {}
    for name, selector in re.findall(r"\b([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[^}]*\})?", re.sub(r"(?<=\{)[^}]*", _kept, bare)):
        if name not in WORDS:
            series.setdefault(name, set()).update(re.findall(r"<(\w+)>", selector))
    return series, grouped


def _kept(selector: re.Match[str]) -> str:
    """A selector's labels, marked so that they are not taken for series."""
    return "".join(f"<{label}>" for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector[0]))


def unknown(query: str) -> list[str]:
    series, grouped = used(query)
    found = [name for name in series if name not in SERIES]
    for name, labels in series.items():
        found += [f"{name}{{{label}}}" for label in (labels | grouped) - SERIES.get(name, set())]
    return found


def test_what_is_unknown_is_found():
    assert used('sum by (a, le) (rate(m_total{b=~"x|y", c!="by (z)"}[5m])) / max(n)') == (
        {"m_total": {"b", "c"}, "n": set()}, {"a", "le"},
    )  # fmt: skip
    assert unknown("isotherm_ready == 0") == [] and unknown("isotherm_nope == 0") == ["isotherm_nope"]
    assert unknown('isotherm_requests_total{nope="1"}') == ["isotherm_requests_total{nope}"]
    assert unknown("sum by (shard) (isotherm_requests_total)") == ["isotherm_requests_total{shard}"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_dashboards_are_as_their_table_has_them(name):
    assert (FOLDER / f"{name}.json").read_text() == written(name), "run python manifests/observability/dashboards.py"


@pytest.mark.parametrize(("title", "query", "legend"), list(panels()))
def test_panels_ask_for_what_there_is(title, query, legend):
    series, grouped = used(query)
    assert series and not unknown(query)
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    assert shown <= (grouped or set.intersection(*(SERIES[name] for name in series)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_there_is_and_have_a_page(rule):
    assert used(rule["expr"])[0] and not unknown(rule["expr"])
    assert rule["labels"]["severity"] in ("page", "look") and rule["annotations"]["summary"]
    assert f"\n### {rule['alert']}\n" in (DOCS / "operating.md").read_text()


def test_every_alert_is_tried():
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    tried = [(one["alertname"], bool(one["exp_alerts"])) for test in tests for one in test["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {name for name, fires in tried if fires} == names
    assert names - {name for name, fires in tried if not fires} <= {"IsothermControllerAway"}, "each is silent before"


def test_the_table_of_metrics_is_complete():
    table = (DOCS / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)`", table, flags=re.M))
    assert listed == set(families_of_scrape(full_scrape()))
    for name, kind in families_of_scrape(full_scrape()).items():
        (row,) = re.findall(rf"^\| `{name}` .*$", table, flags=re.M)
        assert f"| {kind} |" in row, row
