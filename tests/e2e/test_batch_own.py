"""`isotherm batch --own`: a batch that brings its cluster along. It is gone with the batch, also where that is killed;
the next run asks the rest."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from programs import last_words, running
from served import ISOTHERM

pytestmark = pytest.mark.long

ROWS = 300


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short folder for what a killed batch leaves: Unix sockets have room for 107 characters."""
    with tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield


def start(folder: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [ISOTHERM, "batch", "--own", "tiny", "--input", str(folder / "*.jsonl"),
               "--output", str(folder / "out.jsonl"), "--concurrency", "8"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return running(command, environment)


def lines(folder: Path) -> list[str]:
    path = folder / "out.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_batch_with_its_own_cluster_is_killed_and_completed(tmp_path: Path):
    for name in ("a", "b"):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for i in range(ROWS // 2):
                said = [{"role": "user", "content": f"What is {i} + {len(name)}?"}]
                file.write(json.dumps({"messages": said, "temperature": 0, "max_tokens": 40}) + "\n")
    family: dict[int, psutil.Process] = {}
    with start(tmp_path) as first:
        deadline = time.monotonic() + 250
        while not ROWS // 10 < len(lines(tmp_path)) < ROWS:
            assert time.monotonic() < deadline and first.poll() is None, last_words(first)
            family |= {process.pid: process for process in psutil.Process(first.pid).children(recursive=True)}
            time.sleep(0.05)
        first.kill()
    assert len(family) > 5  # Ray and its workers
    _, alive = psutil.wait_procs(list(family.values()), timeout=60)
    assert alive == []

    with start(tmp_path) as second:
        output = second.communicate(timeout=250)[0]
    assert second.returncode == 0 and f"{ROWS} of {ROWS} rows done" in output, output
    results = [json.loads(line) for line in lines(tmp_path)]
    assert sorted(one["custom_id"] for one in results) == sorted(
        f"{name}.jsonl:{i}" for name in ("a", "b") for i in range(1, ROWS // 2 + 1)
    )
    answers = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in results}
    assert answers["a.jsonl:4"] == answers["b.jsonl:4"] == "3 + 1 = 4."
