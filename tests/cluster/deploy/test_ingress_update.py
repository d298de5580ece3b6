"""What of a manifest an update of the ingress may change."""

from __future__ import annotations

from typing import Any

import pytest

from isotherm.cluster.deploy.ingress_update import beside_the_front_door, check_front_door
from isotherm.cluster.deploy.rolled_values import as_operated
from isotherm.cluster.manifest import ManifestError, parse_manifest

RUNNING = {"model": "tiny", "http": {"port": 8001}}


@pytest.mark.parametrize("fields", [
    {"http": {"port": 8001, "aliases": ["a"], "drain_seconds": 9.0}}, {"served_name": "other"}, {"model": "elsewhere"},
    {"engine": {"shared_prefix_cache": True}, "tool_format": "none", "generation_config": "none"},
])  # fmt: skip
def test_what_the_front_door_alone_depends_on_may_change(fields: dict[str, Any]):
    check_front_door(parse_manifest(RUNNING), parse_manifest(RUNNING | fields))


@pytest.mark.parametrize(("fields", "named"), [
    ({"http": {"port": 8002}}, r"http.port: 8001 → 8002 \(cannot be rolled: Serve listens"),
    ({"http": {"port": 8001, "host": "0.0.0.0", "keys": "/k.json"}}, r"http.host: .*; http.keys: null → "),
    ({"engine": {"block_size": 8}, "dtype": "float32"}, r"dtype: .*; engine.block_size: 16 → 8 \(by isotherm roll --m"),
    ({"experts": {"groups": 4}}, r"experts.groups: 2 → 4 \(by isotherm scale\)"),
])  # fmt: skip
def test_what_cannot_change_under_a_cluster_is_named(fields: dict[str, Any], named: str):
    with pytest.raises(ManifestError, match=named):
        check_front_door(parse_manifest(RUNNING), parse_manifest(RUNNING | fields))


@pytest.mark.parametrize("groups", [2, 3])
def test_the_number_of_workers_may_be_that_of_the_start_or_that_which_a_scale_has_made(groups: int):
    running = parse_manifest(RUNNING)
    now = as_operated(running, shards=1, groups=3, model="/models/other")
    wanted = parse_manifest(RUNNING | {"experts": {"groups": groups}, "served_name": "other"})
    check_front_door(running, wanted, now)
    with pytest.raises(ManifestError, match=r"experts.groups: 2 → 4 \(by isotherm scale\)"):
        check_front_door(running, parse_manifest(RUNNING | {"experts": {"groups": 4}}), now)
    rolled = parse_manifest(RUNNING | {"model": "/models/other"})
    assert beside_the_front_door(running, rolled, now, model=True) == []
