"""The nodes of a Ray cluster beside each other: clocks, versions, kernels, environment, the checkpoint's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isotherm.cluster.doctor.environment import judge_environment, look_at_environment
from isotherm.cluster.doctor.finding import Finding, State, fail, ok, warn
from isotherm.cluster.doctor.limits import LimitFacts, judge_limits, look_at_limits
from isotherm.cluster.doctor.machine import MachineFacts, judge_machine, look_at_machine
from isotherm.cluster.doctor.versions import VersionFacts, judge_versions, look_at_versions

SKEW = 1.0  # seconds by which clocks may differ: the history of operations and the logs would mislead beyond


@dataclass(frozen=True)
class NodeFacts:
    machine: MachineFacts
    limits: LimitFacts
    versions: VersionFacts
    environment: Mapping[str, str]
    has_model: bool | None  # None: no model was asked about


@dataclass(frozen=True)
class Node:
    """`offset`: seconds that its clock is ahead of the one who asks, give or take `uncertainty`. `facts`: None where it
    could not say, for `error`."""

    address: str
    facts: NodeFacts | None
    offset: float = 0.0
    uncertainty: float = 0.0
    error: str = ""


def look_at_node(model: str | None) -> NodeFacts:
    """Run on each of them."""
    has_model = None if model is None else (Path(model) / "config.json").is_file()
    return NodeFacts(look_at_machine(), look_at_limits(), look_at_versions(), look_at_environment(), has_model)


def judge_nodes(nodes: Sequence[Node]) -> list[Finding]:
    """What is well everywhere is said once; what is not, for each node."""
    found: list[Finding] = [
        fail("node", f"does not answer: {node.error}", "is isotherm installed there, in the same Python?")
        if node.facts is None
        else ok("node", "answers")
        for node in nodes
    ]
    found = [replace(finding, where=node.address) for finding, node in zip(found, nodes, strict=True)]
    there = [(node, node.facts) for node in nodes if node.facts is not None]
    found += _clocks([node for node, _ in there])
    found += _alike("isotherm", {node.address: facts.versions.isotherm for node, facts in there})
    found += _alike("ray", {node.address: facts.versions.installed.get("ray", "none") for node, facts in there})
    found += _alike("python", {node.address: facts.versions.python.rpartition(".")[0] for node, facts in there})
    found += _numerics({node.address: _numerics_of(facts.machine) for node, facts in there})
    for node, facts in there:
        own = [*judge_machine(facts.machine), *judge_limits(facts.limits), *judge_versions(facts.versions)]
        own += judge_environment(facts.environment)
        found += [replace(finding, where=node.address) for finding in own if finding.state is not State.OK]
        if facts.has_model is False:
            words = "the checkpoint is not there"
            found.append(replace(fail("checkpoint", words, "put it under the same path on every node"),
                                 where=node.address))  # fmt: skip
    return found


def _clocks(nodes: Sequence[Node]) -> list[Finding]:
    late = [node for node in nodes if abs(node.offset) - node.uncertainty > SKEW]
    found = [
        replace(warn("clock", f"{node.offset:+.1f} s from this machine's", "run chrony or ntpd on it"),
                where=node.address) for node in late
    ]  # fmt: skip
    return found or [ok("clocks", f"within {SKEW:g} s of this machine's")]


def _alike(subject: str, by_node: dict[str, str]) -> list[Finding]:
    if len(set(by_node.values())) < 2:
        return []
    usual = Counter(by_node.values()).most_common(1)[0][0]
    others = [f"{node} has {version}" for node, version in by_node.items() if version != usual]
    return [fail(subject, f"differs: {', '.join(others)}, the others {usual}", "install the same on every node")]


def _numerics_of(machine: MachineFacts) -> str:
    return f"{machine.kernels} {machine.instructions}"


def _numerics(by_node: dict[str, str]) -> list[Finding]:
    if len(set(by_node.values())) < 2:
        return []
    words = ", ".join(f"{node}: {numerics}" for node, numerics in by_node.items())
    advice = (
        "workers of one cluster must compute the same bits: choose nodes by attention.labels and experts.labels, "
        "or let them differ by `mixed: allow`"
    )
    return [warn("numerics", f"nodes would compute different bits ({words})", advice)]
