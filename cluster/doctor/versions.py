"""Whether what is installed is what Isotherm was made for."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from isotherm.cluster.doctor.finding import Finding, fail, ok, warn

CHECKED = ("ray", "torch")
NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")  # each puts its library into the same file


@dataclass(frozen=True)
class VersionFacts:
    """`requires`: what Isotherm's own metadata says; `python_wanted`: likewise, of Python."""

    python: str
    python_wanted: str
    isotherm: str
    requires: Sequence[str]
    installed: Mapping[str, str]


def look_at_versions() -> VersionFacts:
    installed = {}
    for name in (*CHECKED, *NCCL):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    own = metadata.metadata("isotherm")
    return VersionFacts(
        platform.python_version(),
        own["Requires-Python"] or "",
        own["Version"],
        metadata.requires("isotherm") or [],
        installed,
    )


def judge_versions(facts: VersionFacts) -> list[Finding]:
    wanted = {r.name: r for r in map(Requirement, facts.requires) if r.marker is None or r.marker.evaluate()}
    python = Requirement(f"python{facts.python_wanted}")
    found = [_one("python", facts.python, python)]
    found += [_one(name, facts.installed.get(name), wanted.get(name)) for name in CHECKED]
    return found + _nccl(facts.installed)


def _nccl(installed: Mapping[str, str]) -> list[Finding]:
    if not all(name in installed for name in NCCL):
        return []
    words = f"{' and '.join(NCCL)} are both installed, and the later one has overwritten the other's library"
    advice = f"pip uninstall {' '.join(NCCL)}, then install the one that `pip show torch` requires"
    return [warn("NCCL", words, advice)]


def _one(name: str, version: str | None, wanted: Requirement | None) -> Finding:
    needs = "" if wanted is None else str(wanted.specifier)
    advice = f"pip install '{name}{needs}'" if name != "python" else f"use Python {needs}"
    if version is None:
        return fail(name, "is not installed", advice)
    bare = version.partition("+")[0]  # torch's builds differ by what comes after it
    if wanted is not None and not wanted.specifier.contains(bare, prereleases=True):
        return fail(name, f"is {version}, and Isotherm needs {needs}", advice)
    return ok(name, version)
