"""Scaling and dying under live traffic: nothing is refused, lost or altered, and operations are transactions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from chats import ChatWorkload
from loaded import check, kill_controller, lose, under_load
from served import Served
from streams import Workload

from isotherm.cluster.client import APIError, Client

ROUNDS = int(os.environ.get("ISOTHERM_CHAOS_ROUNDS", "1"))  # `make chaos` asks for more


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    manifest = {
        "attention": {"cpus": 0.2},
        "experts": {"cpus": 0.1},
        "liveness": {"timeout": 5.0},
        "autoscaling": {"mode": "off"},
    }
    cluster = Served(manifest, tmp_path_factory.mktemp("elastic"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


@pytest.fixture(scope="module")
def workload() -> tuple[Workload, list[str]]:
    work = Workload(32, [150])
    return work, work.alone()


def test_undisturbed(served, workload, record_property):
    work, expected = workload
    check(asyncio.run(work.serve(served.url)), expected, record_property, "undisturbed")
    cores = len(os.sched_getaffinity(0))
    threads = {"attention": cores, "expert": max(1, cores // 2)}
    assert all(w["threads"] == threads[w["role"]] for w in served.status()["workers"])


def test_scaling_under_load(served, workload, record_property):
    work, expected = workload

    def scale() -> None:
        with Client(served.url) as client:
            for _ in range(ROUNDS):
                for target in (
                    {"expert_groups": 4},
                    {"attention_shards": 2},
                    {"expert_groups": 2},
                    {"attention_shards": 1},
                ):
                    operation = client.wait_for_operation(client.scale(**target)["id"], timeout=90)
                    assert operation["phase"] == "done", operation

    check(
        under_load(served, work, scale),
        expected,
        record_property,
        f"2 → 4 → 2 groups and 1 → 2 → 1 shards, {ROUNDS} times",
    )
    workers = served.status()["workers"]
    roles = [w["role"] for w in workers]
    assert (roles.count("attention"), roles.count("expert")) == (1, 2)
    groups = [w for w in workers if w["role"] == "expert"]  # which have back what the others held meanwhile
    copied = [w["loaded_from"].get("peer", {"experts": 0})["experts"] for w in groups]
    assert any(copied) or groups[0]["kernels"] != "native", groups


def test_copies_under_load(served, workload, record_property):
    work, expected = workload

    def copy() -> None:
        with Client(served.url) as client:
            for count in (2, 1):
                copies = [{"layer": layer, "expert": expert, "count": count} for layer in (1, 2) for expert in range(6)]
                assert client.wait_for_operation(client.scale(copies=copies)["id"], timeout=90)["phase"] == "done"
                held = client.experts()["layers"]
                assert [len(h) for h in held[0]["holders"][:6]] == [count] * 6

    check(under_load(served, work, copy), expected, record_property, "12 experts copied and dropped")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("role", ["expert", "attention"])
def test_a_worker_dies_or_hangs_under_load(served, workload, record_property, role, how):
    work, expected = workload

    def act() -> None:
        for _ in range(ROUNDS):
            time.sleep(1.0)
            lose(served, role, how)

    check(under_load(served, work, act), expected, record_property, f"{role} worker, {how.name}, {ROUNDS} times")
    roles = [w["role"] for w in served.status()["workers"]]
    assert (roles.count("attention"), roles.count("expert")) == (1, 2)


def test_all_shards_are_killed_at_once_under_load(served, workload, record_property):
    """The ingress hears of one after the other, and takes what was at the first to one that is dead already."""
    work, expected = workload

    def act() -> None:
        with Client(served.url) as client:
            assert client.wait_for_operation(client.scale(attention_shards=2)["id"], timeout=90)["phase"] == "done"
            for _ in range(ROUNDS):
                time.sleep(1.0)
                lose(served, "attention", signal.SIGKILL, 2)
            assert client.wait_for_operation(client.scale(attention_shards=1)["id"], timeout=90)["phase"] == "done"

    check(under_load(served, work, act), expected, record_property, f"both shards killed at once, {ROUNDS} times")


@pytest.fixture(scope="module")
def chats() -> tuple[ChatWorkload, list[str]]:
    work = ChatWorkload(18)
    return work, work.alone()


@pytest.mark.parametrize("role", ["expert", "attention", "controller"])
def test_calls_and_schemas_go_on_where_a_worker_dies(served, chats, record_property, role):
    work, expected = chats

    def act() -> None:
        for _ in range(ROUNDS):
            time.sleep(1.0)
            if role == "controller":
                kill_controller(served)
            else:
                lose(served, role, signal.SIGKILL)

    check(under_load(served, work, act), expected, record_property, f"chats, {role} killed, {ROUNDS} times")


def test_a_target_that_cannot_be_placed_rolls_back(served, workload, record_property):
    work, expected = workload
    with Client(served.url) as client:
        before = client.status()
        operation = client.scale(expert_groups=60, deadline_seconds=8)
        with pytest.raises(APIError) as error:
            client.scale(expert_groups=3)
        assert error.value.status == 409
        while not (waiting := client.operation(operation["id"]))["waiting"]:
            time.sleep(0.1)
        assert waiting["phase"] == "planned" and waiting["reasons"] == ["waiting for resources"]
        copied = client.scale(copies=[{"layer": 1, "expert": 0, "count": 2}])  # needs none
        assert client.wait_for_operation(copied["id"])["phase"] == "done"
        assert client.operation(operation["id"])["phase"] == "planned"
        check(asyncio.run(work.serve(served.url)), expected, record_property, "while a target waits for room")
        operation = client.wait_for_operation(operation["id"], timeout=60)
        assert operation["phase"] == "rolled_back" and "8 s" in " ".join(operation["reasons"]), operation
        after = client.status()
        assert [w["id"] for w in after["workers"]] == [w["id"] for w in before["workers"]]
        assert after["placement_version"] == before["placement_version"] + 1  # the copy
        assert client.wait_for_operation(client.scale(expert_groups=3)["id"])["phase"] == "done"
        assert client.wait_for_operation(client.scale(expert_groups=2)["id"])["phase"] == "done"
    check(asyncio.run(work.serve(served.url)), expected, record_property, "after the roll-back")


def test_the_controller_is_killed_under_load(served, workload, record_property):
    work, expected = workload

    def kill() -> None:
        with Client(served.url) as client:
            for _ in range(ROUNDS):
                before = client.scale(expert_groups=2, idempotency_key=f"before-{time.time()}")
                assert client.wait_for_operation(before["id"])["phase"] == "done"
                workers = {w["id"]: w["pid"] for w in served.status()["workers"]}
                status = kill_controller(served)
                assert {w["id"]: w["pid"] for w in status["workers"]} == workers and status["controller"][
                    "phase"
                ] == "serving"
                assert client.operation(before["id"])["phase"] == "done"  # the history is still there
                lose(served, "expert", signal.SIGKILL)
                for target in (
                    {"expert_groups": 3, "attention_shards": 2},
                    {"expert_groups": 2, "attention_shards": 1},
                ):
                    operation = client.wait_for_operation(client.scale(**target)["id"], timeout=90)
                    assert operation["phase"] == "done" and operation["id"] != before["id"], operation

    check(under_load(served, work, kill), expected, record_property, f"controller killed, {ROUNDS} times")


def test_the_controller_hangs_under_load(served, workload, record_property):
    work, expected = workload

    def stop() -> None:
        with Client(served.url) as client:
            for _ in range(ROUNDS):
                workers = {w["id"]: w["pid"] for w in served.status()["workers"]}
                stopped = served.status()["controller"]["pid"]
                begin = time.monotonic()
                status = kill_controller(served, signal.SIGSTOP)
                print(f"the controller was replaced after {time.monotonic() - begin:.1f} s")
                assert {w["id"]: w["pid"] for w in status["workers"]} == workers and not psutil.pid_exists(stopped)
                assert client.wait_for_operation(client.scale(expert_groups=2)["id"])["phase"] == "done"

    check(under_load(served, work, stop), expected, record_property, f"controller stopped, {ROUNDS} times")


OLDER_CONTROLLER = """
import sys
from isotherm.cluster.on_ray.environment import prepare_attach
address = prepare_attach(sys.argv[1])
import ray
from isotherm.cluster.on_ray.session import attach
from isotherm.cluster.on_ray.workers import find_worker
attach(address)
for name in sys.argv[2:]:
    try:
        ray.get(find_worker(name).order.remote(0, "pid"))
        print("obeyed")
    except ray.exceptions.RayTaskError as error:
        print(type(error.cause).__name__)
"""


def test_workers_obey_no_older_controller(served):
    status = served.status()
    assert status["controller"]["restarts"] > 0
    names = [w["id"] for w in status["workers"]]
    arguments = [sys.executable, "-c", OLDER_CONTROLLER, served.ray_address(), *names]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.stdout.split() == ["SupersededError"] * len(names), done


def test_the_controller_is_killed_in_mid_operation(served, workload, record_property):
    work, expected = workload

    def kill(client: Client, later: float) -> None:
        """`later`: seconds after the first new worker has been started; a second one or two,
        and it commits or is done."""
        before = served.status()
        operation = client.scale(expert_groups=4, attention_shards=2)
        while len(served.status()["workers"]) == len(before["workers"]):
            time.sleep(0.05)
        time.sleep(later)
        kill_controller(served)
        ended = client.wait_for_operation(operation["id"], timeout=30)
        if not later:
            assert ended["phase"] == "rolled_back" and "restarted" in ended["reasons"][-1]
        # Waits for what is left of the first to be ended.
        again = client.wait_for_operation(client.scale(expert_groups=3, attention_shards=1)["id"], timeout=90)
        assert again["phase"] == "done", again
        after = served.status()
        old, now = ({w["id"] for w in status["workers"]} for status in (before, after))
        assert old < now and len(now - old) == 1 and all(w["state"] == "loaded" for w in after["workers"])
        if ended["phase"] == "rolled_back":  # a name is not used twice
            assert not now - old & {line.split()[-1] for line in operation["plan"] if line.startswith("start")}
        assert client.wait_for_operation(client.scale(expert_groups=2)["id"])["phase"] == "done"

    def act() -> None:
        with Client(served.url) as client:
            for i in range(ROUNDS):
                kill(client, 0.4 * (i % 10))

    check(
        under_load(served, work, act), expected, record_property, f"controller killed in mid-operation, {ROUNDS} times"
    )


def test_keys_and_dry_runs(served):
    with Client(served.url) as client:
        version = client.status()["placement_version"]
        dry = client.scale(expert_groups=4, dry_run=True)
        assert dry["phase"] == "done" and any("start expert" in line for line in dry["plan"])
        assert client.status()["placement_version"] == version and len(client.status()["workers"]) == 3
        first = client.scale(expert_groups=3, idempotency_key="once")
        assert client.scale(expert_groups=3, idempotency_key="once")["id"] == first["id"]
        assert client.wait_for_operation(first["id"])["phase"] == "done"
        assert client.scale(expert_groups=3, idempotency_key="once")["id"] == first["id"]
        assert client.wait_for_operation(client.scale(expert_groups=2)["id"])["phase"] == "done"
        for body, field in (
            ({"expert_groups": 0}, "expert_groups"),
            ({"copies": [{"layer": 0, "expert": 0, "count": 1}]}, "copies"),
            ({}, "body"),
        ):
            with pytest.raises(APIError) as error:
                client.scale(**body)
            assert error.value.status == 400 and error.value.param == field
        with pytest.raises(APIError) as error:
            client.operation("op-none")
        assert error.value.status == 404
    done = served.command("scale", "--url", served.url, "--expert-groups", "4", "--dry-run")
    assert done.returncode == 0 and "load" in done.stdout
    done = served.command("top", "--url", served.url, "--once")
    assert done.returncode == 0 and "attention-" in done.stdout, done
    assert "in 4 layers, 1/8 … 8 × the layer's mean" in done.stdout, done
