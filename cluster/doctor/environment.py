"""Whether the processes of Ray on a node have the environment that Isotherm needs of them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from isotherm.cluster.doctor.finding import Finding, fail, ok, warn
from isotherm.cluster.on_ray.environment import NODE_ENVIRONMENT

# Without this Serve's proxy is not the front door of docs/api.md. The others make it quicker, safer, and sooner whole.
NEEDED = {name: value for name, value in NODE_ENVIRONMENT.items() if name.endswith("_CALLBACK_IMPORT_PATH")}
WISHED = {
    name: value
    for name, value in NODE_ENVIRONMENT.items()
    if name not in NEEDED and name != "RAY_USAGE_STATS_ENABLED"  # what Ray tells its makers is its user's affair
}
ADVICE = 'start Ray there with the environment of docs/operations.md, "A Ray cluster of your own"'


def look_at_environment() -> dict[str, str]:
    """In a worker process of Ray's, which has what `ray start` was called with."""
    return {name: os.environ[name] for name in NODE_ENVIRONMENT if name in os.environ}


def judge_environment(facts: Mapping[str, str]) -> list[Finding]:
    needed, wished = _differences(facts, NEEDED), _differences(facts, WISHED)
    found = []
    if needed:
        found.append(fail("environment", f"the front door would not do what it must: {needed}", ADVICE))
    if wished:
        found.append(warn("environment", f"not as Isotherm would have it: {wished}", ADVICE))
    return found or [ok("environment", "as Isotherm needs it")]


def _differences(facts: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    missing = [f"{name} is not {value}" for name, value in wanted.items() if name not in facts]
    others = [
        f"{name} is {facts[name]}, not {value}" for name, value in wanted.items() if facts.get(name, value) != value
    ]
    return ", ".join([*missing, *others])
