"""Has something looked at on every node of a Ray cluster, and compares their clocks with this machine's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from isotherm.cluster.errors import one_line
from isotherm.cluster.on_ray.session import attach

SECONDS = 60.0  # in which a node must have answered: a first worker has to be started there
LOOKS = 5  # at its clock; the quickest one counts


@dataclass(frozen=True)
class Probe:
    """What `work` gave on one node; None where it could not be run, for `error`. `offset`: seconds that the node's
    clock is ahead, give or take `uncertainty`."""

    address: str
    result: Any
    offset: float = 0.0
    uncertainty: float = 0.0
    error: str = ""


def probe_nodes(address: str, work: Callable[..., Any], *args: Any) -> list[Probe]:
    """Of a Ray cluster; `address` as `prepare_attach` gave it. `work` is imported by its name there. Raises
    NoClusterError."""
    attach(address)
    try:
        return [_probe(node, work, args) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _clock() -> float:
    return time.time()


def _probe(node: dict[str, Any], work: Callable[..., Any], args: tuple[Any, ...]) -> Probe:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": there, "max_retries": 0}
    address = node["NodeManagerAddress"]
    try:
        result = ray.get(ray.remote(work).options(**options).remote(*args), timeout=SECONDS)
        clock, looks = ray.remote(_clock).options(**options), []
        for _ in range(LOOKS):
            asked = time.time()
            said = ray.get(clock.remote(), timeout=SECONDS)
            looks.append(((time.time() - asked) / 2, said - (asked + time.time()) / 2))
        uncertainty, offset = min(looks)
        return Probe(address, result, offset, uncertainty)
    except (RayError, TimeoutError, ImportError) as error:
        return Probe(address, None, error=one_line(error))
