"""What is said of the system's limits; and that this one's can be had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isotherm.cluster.doctor.limits import LimitFacts, judge_limits, judge_session, look_at_limits

GOOD = LimitFacts(8 << 30, 8 << 30, 65536, 1 << 20, "/tmp", 0.5, 100 << 30)


def test_good_limits():
    assert {finding.state.value for finding in judge_limits(GOOD)} == {"ok"}
    assert judge_limits(replace(GOOD, files=-1))[1].words == "any number"


@pytest.mark.parametrize(
    ("changes", "subject", "state", "words"),
    [
        ({"shm_free": 64 << 20}, "shared memory", "fail", "--shm-size"),
        ({"shm_free": 512 << 20}, "shared memory", "warn", "--shm-size"),
        ({"files": 512}, "open files", "fail", "ulimit -n 65536"),
        ({"files": 4096, "files_hard": 16384}, "open files", "warn", "ulimit -n 16384"),
        ({"disk_used": 0.96}, "disk", "fail", "TMPDIR"),
        ({"disk_used": 0.92}, "disk", "warn", "95%"),
    ],
)
def test_what_is_not_well_is_said_with_what_to_do(changes, subject, state, words):
    (found,) = [f for f in judge_limits(replace(GOOD, **changes)) if f.subject == subject]
    assert found.state.value == state and words in found.advice


def test_a_session_that_could_not_be_is_a_fault():
    (found,) = judge_session("TMPDIR is /x, where Ray cannot write its session")
    assert (found.subject, found.state.value) == ("session", "fail") and "TMPDIR is /x" in found.words
    assert judge_session("") == []


def test_this_machine_can_be_looked_at():
    facts = look_at_limits()
    assert facts.shm > 0 and 0 <= facts.disk_used <= 1 and facts.files != 0
