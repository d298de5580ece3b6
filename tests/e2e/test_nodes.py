"""Several Ray nodes: workers go where there is room, also on a node that joins later, and leave one that is drained.
Under live traffic, over process groups, as between hosts."""

from __future__ import annotations

import time

import pytest
from loaded import check, kill_controller, under_load
from ray_nodes import RayNodes
from served import Served
from streams import Workload

from isotherm.cluster.client import APIError, Client

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def nodes():
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def served(nodes, tmp_path_factory):
    nodes.add(3)
    manifest = {
        "attention": {"cpus": 1},
        "experts": {"cpus": 1},
        "links": {"kind": "process-group"},
        "autoscaling": {"mode": "off"},
    }
    with Served(manifest, tmp_path_factory.mktemp("nodes"), "--address", nodes.address) as cluster:
        yield cluster


def where(served: Served) -> dict[str, str]:
    return {w["id"]: w["node"] for w in served.status()["workers"]}


def test_a_group_goes_to_a_node_that_joins_later_and_a_drained_node_is_left(served, nodes, record_property):
    work = Workload(8, [150])
    expected = work.alone()
    before = where(served)
    first = before["attention-0"]
    with Client(served.url) as client:

        def act() -> None:
            operation = client.scale(expert_groups=3)
            while not (waiting := client.operation(operation["id"])["waiting"]):
                time.sleep(0.2)
            assert (
                waiting[0].startswith("expert-2 waits for a node with 1 CPU")
                and where(served).items() >= before.items()
            )
            second = nodes.add(3)
            assert client.wait_for_operation(operation["id"], timeout=60)["phase"] == "done"
            assert where(served) == before | {"expert-2": second}
            kill_controller(served)  # the links stay, though the store at which they met is gone
            assert client.operation(operation["id"])["phase"] == "done" and where(served) == before | {
                "expert-2": second
            }

            operation = client.wait_for_operation(client.scale(drain_nodes=[first], expert_groups=2)["id"], timeout=60)
            assert operation["phase"] == "done", operation
            now = where(served)
            assert set(now.values()) == {second} and len(now) == 3 and "expert-2" in now

        check(under_load(served, work, act), expected, record_property, "a node joins, another is drained")
        deadline = time.monotonic() + 20
        while nodes.actors_on(first):
            assert time.monotonic() < deadline, nodes.actors_on(first)
            time.sleep(0.2)
        drained = {n["id"]: n["drained"] for n in served.status()["nodes"]}
        assert drained.pop(first) and not any(drained.values())

        # Nothing new comes to it, until it is drained no more.
        operation = client.wait_for_operation(client.scale(expert_groups=3, deadline_seconds=5)["id"], timeout=60)
        assert operation["phase"] == "rolled_back" and f"!in({first})" in " ".join(operation["reasons"]), operation
        operation = client.wait_for_operation(client.scale(expert_groups=3, drain_nodes=[])["id"], timeout=60)
        assert operation["phase"] == "done" and first in where(served).values()
        with pytest.raises(APIError, match="there is no node") as error:
            client.scale(drain_nodes=["0123"])
        assert error.value.status == 400 and error.value.param == "drain_nodes"
    done = served.command("scale", "--url", served.url, "--drain-node", first, "--dry-run")
    assert done.returncode == 0 and "start expert" in done.stdout, done


def test_a_node_is_lost(served, nodes, record_property):
    """All its workers go at once, the only shard among them."""
    work = Workload(8, [150])
    expected = work.alone()

    def act() -> None:
        nodes.add(3)
        before = where(served)
        victim = next(node for worker, node in before.items() if worker.startswith("attention"))
        nodes.remove(victim)
        deadline = time.monotonic() + 90
        while True:
            workers = served.status()["workers"]
            if (
                victim not in {w["node"] for w in workers}
                and len(workers) == len(before)
                and all(w["state"] == "loaded" for w in workers)
            ):
                return
            assert time.monotonic() < deadline, workers
            time.sleep(0.2)

    check(under_load(served, work, act), expected, record_property, "a node is lost")
