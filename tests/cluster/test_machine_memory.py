"""Memory that processes may have, by the machine and by control groups of both versions."""

from __future__ import annotations

from pathlib import Path

from isotherm.cluster.machine_memory import free_memory, machine_memory


def test_this_machine_has_some_memory():
    assert 1 << 28 < machine_memory() <= 1 << 50


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path):
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text("0::/a\n")
    (root / "a").mkdir(parents=True)
    assert 0 < free_memory(own, root) <= machine_memory()
    (root / "a" / "memory.max").write_text("3000000\n")
    (root / "a" / "memory.current").write_text("2500000\n")
    (root / "a" / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert free_memory(own, root) == 900000
    (root / "a" / "memory.max").write_text("max\n")
    assert free_memory(own, root) > 900000
