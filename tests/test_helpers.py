"""What helpers of the other tests leave behind: nothing that is open, also where something fails."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray_nodes
import uvloop
from burst import Burst, Report, run_clients
from fake_engine import http_server
from programs import last_words, running
from ray_nodes import RayNodes

pytestmark = pytest.mark.slow

WAITS = 'import sys\nprint(\'{"address": "1.2.3.4:5"}\', flush=True)\nsys.stdin.read()\n'
FAILS = "import sys\nprint('no Ray here', file=sys.stderr)\n"


@contextmanager
def nothing_left_open() -> Iterator[None]:
    files = set(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(one.message) for one in caught] == []
    assert set(os.listdir("/proc/self/fd")) <= files


async def answering(scope, receive, send) -> None:
    """Everybody is refused for a second, but for one in three, who is never answered."""
    if scope["type"] != "http":
        return
    answering.asked += 1  # type: ignore[attr-defined]
    if answering.asked % 3 == 0:  # type: ignore[attr-defined]
        await asyncio.sleep(60)
    head = {
        "type": "http.response.start",
        "status": 429,
        "headers": [(b"retry-after", b"1"), (b"content-length", b"0")],
    }
    await send(head)
    await send({"type": "http.response.body", "body": b""})


def test_clients_of_a_burst_close_their_connections():
    answering.asked = 0  # type: ignore[attr-defined]
    report = Report()
    with http_server(answering) as url, nothing_left_open():
        burst = Burst(int(url.rpartition(":")[2]), 6, seconds=0.3, patience=0.1, warm=0.0, grace=0.5)
        uvloop.run(run_clients(burst, time.perf_counter(), report))
    assert report.refused and any("had no end 0.5 s after" in words for words in report.wrong)
    with nothing_left_open():
        uvloop.run(run_clients(burst, time.perf_counter(), report := Report()))
    assert len(report.wrong) == 6 and "Connect" in report.wrong[0], "nobody is there"


@pytest.mark.parametrize("program", [WAITS, FAILS])
def test_nodes_leave_nothing_whether_they_start_or_not(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "nodes.py"
    script.write_text(program)
    monkeypatch.setattr(ray_nodes, "__file__", str(script))
    monkeypatch.setattr(ray_nodes.tempfile, "tempdir", str(tmp_path))
    nodes = RayNodes()
    with nothing_left_open():
        if program is FAILS:
            with pytest.raises(RuntimeError, match="no Ray here"):
                nodes.__enter__()
        else:
            with nodes:
                assert nodes.address == "1.2.3.4:5"
    assert list(tmp_path.iterdir()) == [script] and nodes._process.returncode == 0


def test_a_program_that_is_read_ends_with_its_block():
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    with nothing_left_open():
        with running(command, os.environ) as process:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        assert not psutil.pid_exists(process.pid)
        with running(command, os.environ) as process:
            time.sleep(0.5)
            assert last_words(process) == "here\n"
