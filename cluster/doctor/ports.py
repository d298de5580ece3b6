"""Where the front door is to listen, and the ports that Ray chooses from."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx

from isotherm.cluster.deploy.preflight import check_port
from isotherm.cluster.doctor.finding import Finding, fail, ok, warn
from isotherm.cluster.manifest import ManifestError

FEW_PORTS = 2000  # each of Ray's processes listens on some, and each connection has one


@dataclass(frozen=True)
class PortFacts:
    """`refused`: why nothing can listen at the front door's port; empty where something can. `serves`: that it is
    Isotherm which does so. `localhost`: what that name means here; empty: nothing."""

    host: str
    port: int
    refused: str
    serves: bool
    ephemeral: tuple[int, int]
    localhost: str


def look_at_ports(host: str, port: int, url: str) -> PortFacts:
    """`url`: of what is to be served there."""
    try:
        check_port(host, port)
        refused = ""
    except ManifestError as error:
        refused = str(error)
    try:
        localhost = socket.gethostbyname("localhost")
    except OSError:
        localhost = ""
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return PortFacts(host, port, refused, bool(refused) and _serves(url), (int(low), int(high)), localhost)


def _serves(url: str) -> bool:
    """With a certificate or without, whatever the manifest at hand says, and whoever has signed it: nothing is told."""
    place = url.partition("://")[2]
    for scheme in ("http", "https"):
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(f"{scheme}://{place}/health", timeout=3, trust_env=False, verify=False)
            if answer.status_code == 200 and answer.json() == {"status": "alive"}:
                return True
    return False


def judge_ports(facts: PortFacts) -> list[Finding]:
    where = f"{facts.host} port {facts.port}"
    if facts.serves:
        found = [ok("front door", f"a server answers at {where}")]
    elif facts.refused:
        found = [fail("front door", f"{where} cannot be had", facts.refused)]
    else:
        found = [ok("front door", f"{where} is free")]
    low, high = facts.ephemeral
    words = f"{low} to {high} are for Ray and for connections"
    if high - low < FEW_PORTS:
        found.append(warn("ports", words, "few: sysctl net.ipv4.ip_local_port_range='32768 60999'"))
    else:
        found.append(ok("ports", words))
    if not facts.localhost.startswith("127."):
        means = facts.localhost or "nothing"
        found.append(fail("localhost", f"means {means}", "Ray and its dashboard look there: mend /etc/hosts"))
    return found
