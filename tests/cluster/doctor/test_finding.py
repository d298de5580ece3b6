from __future__ import annotations

from isotherm.cluster.doctor.finding import exit_status, fail, ok, warn


def test_only_what_will_not_work_is_a_failure():
    assert exit_status([ok("a", "b"), warn("a", "b", "c")]) == 0 and exit_status([]) == 0
    assert exit_status([ok("a", "b"), fail("a", "b", "c")]) == 1
