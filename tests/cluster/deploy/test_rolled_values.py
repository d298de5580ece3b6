"""Which values of a manifest change by which command: every one has its place."""

from __future__ import annotations

import re
from pathlib import Path

from isotherm.cluster.deploy.rolled_values import (
    RULES,
    WHOLE,
    WHY,
    By,
    Change,
    _rule,
    _values,
    changes,
    with_workers_of,
)
from isotherm.cluster.manifest import parse_manifest

DEFAULT = parse_manifest({})


def test_every_field_has_a_rule_and_every_rule_a_field():
    fields = list(_values(DEFAULT))
    assert [field for field in fields if not _rule(field)] == []
    assert [rule for rule in RULES if not any(f"{field}.".startswith(f"{rule}.") for field in fields)] == []
    assert {rule for rule, by in RULES.items() if by is By.NOTHING} == set(WHY)
    assert set(WHOLE) <= set(fields)


def test_the_table_in_the_docs_says_the_same():
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    text = text[text.index("## Rolling out other values") : text.index("## Updating the ingress")]
    rows = dict(re.findall(r"^\| (.*) \| (.*) \|$", text, re.MULTILINE))
    said = {command: set(re.findall(r"`([a-z_.]+)`", fields)) for fields, command in rows.items()}
    settled = "nothing: they are settled when a cluster is started"
    for by, command in {by: settled if by is By.NOTHING else f"`{by.value}`" for by in set(By) - {By.WORKERS}}.items():
        assert said[command] == {rule for rule, value in RULES.items() if value is by}, by
    for rule in (rule for rule, value in RULES.items() if value is By.WORKERS):
        assert f"`{rule}`" in text, rule


def test_what_is_different_is_found_field_by_field():
    certificate = {"certificate": "/c.pem", "key": "/k.pem"}
    other = parse_manifest({
        "dtype": "float32", "engine": {"block_size": 8, "prefix_cache": False}, "http": {"tls": certificate},
        "attention": {"labels": {"role": "a"}}, "autoscaling": {"copies": {"above": 2.0}},
    })  # fmt: skip
    found = changes(DEFAULT, other)
    assert [(change.field, change.by) for change in found] == [
        ("dtype", By.WORKERS),
        ("attention.labels", By.WORKERS),
        ("engine.block_size", By.WORKERS),
        ("engine.prefix_cache", By.WORKERS),
        ("autoscaling.copies.above", By.NOTHING),
        ("http.tls", By.NOTHING),
    ]
    assert found[-1] == Change("http.tls", None, certificate) and changes(other, other) == []
    assert str(found[2]) == "engine.block_size: 16 → 8"


def test_a_cluster_has_the_front_door_of_one_and_the_workers_of_the_other():
    front = parse_manifest(
        {"model": "/a", "http": {"port": 1, "aliases": ["x"]}, "engine": {"shared_prefix_cache": True}}
    )
    workers = parse_manifest(
        {"model": "/b", "http": {"port": 2}, "engine": {"block_size": 8}, "experts": {"groups": 5}}
    )
    both = with_workers_of(front, workers)
    assert (both.model, both.http, both.experts.groups) == ("/a", front.http, 2)
    assert (both.engine.block_size, both.engine.shared_prefix_cache) == (8, True)
    assert with_workers_of(both, both) == both
