"""A program that starts a Ray of its own, run to its end from the repository's root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def run_driver(program: str) -> dict[str, Any]:
    """What it prints last, as JSON. Its argument is a folder for Ray; the processes that it names in `family` must have
    ended soon after it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTEST_ADDOPTS") and not name.startswith("RAY_")
    }
    with tempfile.TemporaryDirectory(prefix="driver-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", program, folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert len(seen["family"]) > 2
        _, alive = psutil.wait_procs(
            [psutil.Process(pid) for pid in seen["family"] if psutil.pid_exists(pid)], timeout=15
        )
        assert [p.cmdline()[:2] for p in alive if p.is_running()] == []
    return seen
