"""Nodes beside each other."""

from __future__ import annotations

from dataclasses import replace

from isotherm.cluster.doctor.limits import LimitFacts
from isotherm.cluster.doctor.machine import MachineFacts
from isotherm.cluster.doctor.nodes import Node, NodeFacts, judge_nodes
from isotherm.cluster.doctor.versions import VersionFacts
from isotherm.cluster.on_ray.environment import NODE_ENVIRONMENT

FACTS = NodeFacts(
    MachineFacts(8, None, 64 << 30, 32 << 30, "native", "avx2", ""),
    LimitFacts(8 << 30, 8 << 30, 65536, 1 << 20, "/tmp", 0.5, 100 << 30),
    VersionFacts("3.11.7", ">=3.10", "0.1.0", ["ray>=2.60"], {"ray": "2.60.0", "torch": "2.13.0"}),
    NODE_ENVIRONMENT,
    True,
)


def wrong(*nodes: Node) -> list[tuple[str, str, str]]:
    found = [f for f in judge_nodes(nodes) if f.state.value != "ok"]
    assert all(f.advice for f in found)
    return [(f.where, f.subject, f.state.value) for f in found]


def test_nodes_that_are_well():
    assert wrong(Node("a", FACTS), Node("b", FACTS, offset=3.0, uncertainty=2.5)) == []


def test_a_node_that_does_not_answer_and_one_without_the_checkpoint():
    assert wrong(Node("a", None, error="no module named isotherm"), Node("b", replace(FACTS, has_model=False))) == [
        ("a", "node", "fail"), ("b", "checkpoint", "fail"),
    ]  # fmt: skip


def test_a_clock_that_is_off():
    assert wrong(Node("a", FACTS), Node("b", FACTS, offset=-4.0, uncertainty=0.1)) == [("b", "clock", "warn")]


def test_versions_and_bits_that_differ():
    other = replace(FACTS.versions, isotherm="0.2.0", python="3.12.1", installed={"ray": "2.60.1", "torch": "2.13.0"})
    found = wrong(Node("a", FACTS), Node("b", replace(FACTS, versions=other)), Node("c", FACTS))
    assert found == [("", name, "fail") for name in ("isotherm", "ray", "python")]
    machine = replace(FACTS.machine, instructions="avx512_bf16")
    assert wrong(Node("a", FACTS), Node("b", replace(FACTS, machine=machine))) == [("", "numerics", "warn")]


def test_what_is_not_well_on_a_node_is_said_with_its_name():
    facts = replace(FACTS, limits=replace(FACTS.limits, shm_free=1 << 20))
    assert wrong(Node("a", FACTS), Node("b", facts)) == [("b", "shared memory", "fail")]


def test_a_node_whose_ray_was_started_without_the_environment():
    nodes = (Node("a", FACTS), Node("b", replace(FACTS, environment={})))
    assert wrong(*nodes) == [("b", "environment", "fail"), ("b", "environment", "warn")]
