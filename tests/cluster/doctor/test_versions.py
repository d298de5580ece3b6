from __future__ import annotations

from dataclasses import replace

from isotherm.cluster.doctor.versions import VersionFacts, judge_versions, look_at_versions

REQUIRES = ["ray[default,serve]<2.61,>=2.60", "torch==2.13.0", "triton>=3.7; extra == 'gpu'"]
GOOD = VersionFacts("3.11.7", ">=3.10", "0.1.0", REQUIRES, {"ray": "2.60.1", "torch": "2.13.0+cpu"})


def states(facts: VersionFacts) -> dict[str, str]:
    return {finding.subject: finding.state.value for finding in judge_versions(facts)}


def test_what_is_wanted_is_there():
    assert states(GOOD) == {"python": "ok", "ray": "ok", "torch": "ok"}
    assert states(look_at_versions()) == {"python": "ok", "ray": "ok", "torch": "ok"}


def test_what_is_not():
    assert states(replace(GOOD, python="3.9.18"))["python"] == "fail"
    assert states(replace(GOOD, installed={"torch": "2.13.0"}))["ray"] == "fail"
    (ray,) = [f for f in judge_versions(replace(GOOD, installed={"ray": "2.61.0"})) if f.subject == "ray"]
    assert "needs <2.61,>=2.60" in ray.words and "pip install" in ray.advice


def test_two_nccls_are_one_too_many():
    """They have one file in common: whichever was installed later is loaded, whatever CUDA torch is for."""
    twelve, thirteen = {"nvidia-nccl-cu12": "2.32.3"}, {"nvidia-nccl-cu13": "2.29.7"}
    for one in (twelve, thirteen):
        assert "NCCL" not in states(replace(GOOD, installed={**GOOD.installed, **one}))
    assert states(replace(GOOD, installed={**GOOD.installed, **twelve, **thirteen}))["NCCL"] == "warn"
