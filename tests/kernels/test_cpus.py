"""How many CPUs there are for this process, by affinity and by control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from isotherm.kernels import cpus
from isotherm.kernels.cpus import control_groups, cpu_quota, usable_cpus


def test_control_groups_of_both_versions(tmp_path: Path):
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,memory:/a/b\n2:cpu:/x\n0::/c/d\n")
    root = Path("/g")
    found = set(control_groups("memory", own, root))
    assert {root / "memory/a/b", root / "memory/a", root / "c/d", root / "c", root, root / "memory"} == found
    assert set(control_groups("memory", tmp_path / "none", root)) == {root, root / "memory"}
    assert root / "cpu/x" in set(control_groups("cpu", own, root))


def test_the_least_quota_of_all_groups_counts(tmp_path: Path):
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text("0::/a/b\n1:cpu,cpuacct:/old\n")
    for folder in ("a/b", "cpu/old"):
        (root / folder).mkdir(parents=True)
    assert cpu_quota(own, root) is None
    (root / "cpu.max").write_text("max 100000\n")
    (root / "cpu" / "old" / "cpu.cfs_quota_us").write_text("-1\n")
    (root / "cpu" / "old" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(own, root) is None
    (root / "a" / "cpu.max").write_text("250000 100000\n")
    (root / "a" / "b" / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(own, root) == 2.5
    (root / "cpu" / "old" / "cpu.cfs_quota_us").write_text("150000\n")
    assert cpu_quota(own, root) == 1.5


@pytest.mark.parametrize(("quota", "expected"), [(None, 12), (64.0, 12), (12.0, 12), (3.7, 3), (0.5, 1)])
def test_no_more_are_used_than_there_is_time_for(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert usable_cpus() == expected


def test_this_process_has_some():
    assert usable_cpus() >= 1
