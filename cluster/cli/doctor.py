"""`isotherm doctor`: looks at this machine, or at a cluster's nodes, and says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from isotherm.cluster.api.batches.store import FOLDERS
from isotherm.cluster.deploy.session_folder import session_trouble
from isotherm.cluster.doctor.batches import judge_batches, look_at_batches
from isotherm.cluster.doctor.checkpoint import check_checkpoint
from isotherm.cluster.doctor.finding import Finding, State, exit_status
from isotherm.cluster.doctor.limits import judge_limits, judge_session, look_at_limits
from isotherm.cluster.doctor.machine import judge_machine, look_at_machine
from isotherm.cluster.doctor.nodes import Node, judge_nodes, look_at_node
from isotherm.cluster.doctor.ports import judge_ports, look_at_ports
from isotherm.cluster.doctor.proxies import judge_proxies, look_at_proxies
from isotherm.cluster.doctor.versions import judge_versions, look_at_versions
from isotherm.cluster.manifest import Manifest

STYLES = {State.OK: "green", State.WARN: "yellow", State.FAIL: "bold red"}


def examine_machine(manifest: Manifest, path: Path | None) -> list[Finding]:
    """This machine, as one that is to serve the manifest; `path`: of its checkpoint, where one was asked about."""
    machine = look_at_machine()
    found = [
        *judge_machine(machine),
        *judge_limits(look_at_limits()),
        *judge_session(session_trouble()),
        *judge_batches(look_at_batches(manifest.http, FOLDERS)),
        *judge_ports(look_at_ports(manifest.http.host, manifest.http.port, manifest.url)),
        *judge_proxies(look_at_proxies()),
        *judge_versions(look_at_versions()),
    ]
    return found + ([] if path is None else check_checkpoint(manifest, path, machine.memory, os.cpu_count() or 1))


def examine_cluster(address: str, path: Path | None) -> list[Finding]:
    """Every node of a Ray cluster. Raises NoClusterError."""
    from isotherm.cluster.on_ray.node_probe import probe_nodes  # after Ray's environment is set

    probes = probe_nodes(address, look_at_node, None if path is None else str(path))
    nodes = [Node(p.address, p.result, p.offset, p.uncertainty, p.error) for p in probes]
    return judge_nodes(nodes) + judge_proxies(look_at_proxies(), [node.address for node in nodes])


def report(manifest: Manifest, path: Path | None, address: str | None, console: Console | None) -> int:
    """Look and tell, as JSON where there is no console; the exit status."""
    found = examine_machine(manifest, path) if address is None else examine_cluster(address, path)
    if console is None:
        print(json.dumps([asdict(finding) for finding in found]))
    else:
        show(found, console)
    return exit_status(found)


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line or two for each, what is wrong last."""
    order = list(State)
    width = max(len(_subject(finding)) for finding in findings)
    for finding in sorted(findings, key=lambda f: order.index(f.state)):
        head = Text.assemble((f"{finding.state.value:4}", STYLES[finding.state]), f"  {_subject(finding):{width}}  ")
        console.print(head + Text(finding.words), soft_wrap=True, highlight=False)
        if finding.advice:
            console.print(Text(f"      {'':{width}}  → {finding.advice}"), soft_wrap=True, highlight=False)
    bad = [sum(finding.state is state for finding in findings) for state in (State.FAIL, State.WARN)]
    verdict = "it will not work as it is" if bad[0] else "it will work" if bad[1] else "all is well"
    console.print(f"{bad[0]} will not work, {bad[1]} could be better: {verdict}", highlight=False)


def _subject(finding: Finding) -> str:
    return f"{finding.where} {finding.subject}".strip()
