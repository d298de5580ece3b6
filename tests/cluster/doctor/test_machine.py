"""What is said of a machine, from its facts; and that this one's can be had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isotherm.cluster.doctor.machine import MachineFacts, judge_machine, look_at_machine

GOOD = MachineFacts(8, None, 64 << 30, 32 << 30, "native", "avx2", "")


def states(facts: MachineFacts) -> dict[str, str]:
    return {finding.subject: finding.state.value for finding in judge_machine(facts)}


def test_a_good_machine():
    assert states(GOOD) == {"cores": "ok", "kernels": "ok", "memory": "ok"}


@pytest.mark.parametrize(
    ("changes", "subject", "state", "words"),
    [
        ({"cores": 1}, "cores", "warn", "1 core"),
        ({"quota": 2.5}, "cores", "warn", "2 threads at most"),
        ({"kernels": "reference", "kernels_reason": "not built"}, "kernels", "warn", "C++ compiler"),
        ({"instructions": "generic"}, "kernels", "warn", "AVX2"),
        ({"free_memory": 900 << 20}, "memory", "fail", "2 GiB"),
        ({"free_memory": 2 << 30}, "memory", "warn", "bundled model"),
    ],
)
def test_what_is_not_well_is_said_with_what_to_do(changes, subject, state, words):
    (found,) = [f for f in judge_machine(replace(GOOD, **changes)) if f.subject == subject]
    assert found.state.value == state and found.advice and words in f"{found.words} {found.advice}"


def test_this_machine_can_be_looked_at():
    facts = look_at_machine()
    assert facts.cores >= 1 and 0 < facts.free_memory <= facts.memory and facts.kernels and facts.instructions
