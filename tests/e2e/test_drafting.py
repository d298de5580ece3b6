"""Guessed tokens in a cluster that scales and loses an expert group: each stream is what it is without guesses."""

from __future__ import annotations

import signal

import pytest
from loaded import check, lose, under_load
from served import Served
from streams import Workload

from isotherm.cluster.client import Client


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    manifest = {
        "attention": {"cpus": 0.2},
        "experts": {"cpus": 0.1},
        "liveness": {"timeout": 5.0},
        "autoscaling": {"mode": "off"},
        "speculation": {"kind": "mtp"},
    }
    cluster = Served(manifest, tmp_path_factory.mktemp("drafting"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


def test_guesses_go_on_where_a_group_dies_and_others_come(served, record_property):
    work = Workload(12, [120])
    expected = work.alone()  # by an engine that guesses nothing

    def act() -> None:
        with Client(served.url) as client:
            for target in ({"expert_groups": 3}, {"attention_shards": 2}):
                assert client.wait_for_operation(client.scale(**target)["id"], timeout=60)["phase"] == "done"
            lose(served, "expert", signal.SIGKILL)
            smaller = client.scale(expert_groups=2, attention_shards=1)
            assert client.wait_for_operation(smaller["id"], timeout=60)["phase"] == "done"

    check(under_load(served, work, act), expected, record_property, "with guesses, scaled, a group killed")
    (shard,) = (worker for worker in served.status()["workers"] if worker["role"] == "attention")
    found = shard["speculation"]
    assert found["kind"] == "mtp" and found["drafted"] > 0 and sum(found["accepted"]) > 0, found
    assert "drafting failed" not in found["why"], found
    for command in (("status",), ("top", "--url", served.url, "--once")):
        done = served.command(*command)
        assert done.returncode == 0 and f"{shard['id']} drafts by mtp: " in done.stdout, done
