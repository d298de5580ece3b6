"""What helpers of the other tests leave behind: nothing that is open, also where something fails. And whether those
that decide what is tested do so."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import cast

import psutil
import pytest
import ray_nodes
import uvloop
from burst import Burst, Report, run_clients
from fake_engine import http_server
from native_there import require_native
from programs import last_words, running
from ray_nodes import RayNodes
from waiting import until

from isotherm.kernels.native import library as native_library
from isotherm.kernels.native import ring as native_ring
from isotherm.kernels.native import signatures

pytestmark = pytest.mark.slow

WAITS = 'import sys\nprint(\'{"address": "1.2.3.4:5"}\', flush=True)\nsys.stdin.read()\n'
FAILS = "import sys\nprint('no Ray here', file=sys.stderr)\n"


PATIENCE = 10.0  # in seconds, for a server of this process to see that its clients are gone, and close its ends


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Neither by the block nor, a moment later, by a server in another thread of this process: the machine may be busy,
    and its ends of the connections are files of this process too. What a client leaves open stays so."""
    files = set(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(one.message) for one in caught] == []
    until(lambda: set(os.listdir("/proc/self/fd")) <= files, PATIENCE)


async def busy(scope, receive, send) -> None:
    """Whoever asks keeps the server from everything else for a moment, as a busy machine does."""
    await asyncio.sleep(0.1)
    time.sleep(0.5)


def test_a_server_that_is_late_to_close_its_ends_has_left_nothing_open():
    with (
        http_server(busy, timeout_graceful_shutdown=1) as url,
        nothing_left_open(),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        time.sleep(0.3)


def test_what_a_block_leaves_open_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE", 0.2)
    left: list[int] = []
    with pytest.raises(AssertionError), nothing_left_open():
        left += os.pipe()
    for descriptor in left:
        os.close(descriptor)


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
    with http_server(answering, timeout_graceful_shutdown=1) as url, nothing_left_open():
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
    command = [sys.executable, "-c", "import os, time; os.write(1, b'here\\n'); time.sleep(60)"]
    with nothing_left_open():
        with running(command, os.environ) as process:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        assert not psutil.pid_exists(process.pid)
        with running(command, os.environ) as process:
            select.select([process.stdout], [], [], 30)
            assert last_words(process) == "here\n"


# --- the native library ---------------------------------------------------------------------------


@pytest.fixture
def loads_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test: what this process has loaded stays with the others."""
    for module in (native_library, native_ring):
        monkeypatch.setattr(module, "load", module.load.__wrapped__)


def outcome(ring: bool) -> str:
    """Of asking for the native library; a skip in a test would be one of the test itself."""
    try:
        require_native(ring)
    except (native_library.NativeKernelsUnavailable, pytest.skip.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return "there"


@pytest.mark.parametrize("ring", [False, True], ids=["kernels", "links"])
def test_only_a_library_that_was_not_built_is_skipped(loads_anew: None, ring: bool, monkeypatch: pytest.MonkeyPatch):
    """A build that has gone wrong would else look as one that nobody has asked for."""
    monkeypatch.setattr(native_library, "built_library", lambda: None)
    assert outcome(ring).startswith("Skipped: the native library was not built")
    mathematics = Path(cast(str, find_library("m")))  # it can be opened, and has none of the functions
    monkeypatch.setattr(native_library, "built_library", lambda: mathematics)
    assert outcome(ring).startswith(f"NativeKernelsUnavailable: the native CPU kernels at {mathematics} don't load")


@pytest.mark.skipif(native_library.built_library() is None, reason="the native library was not built")
@pytest.mark.skipif(sys.platform != "linux", reason="links in shared memory need Linux")
def test_a_library_that_lacks_a_function_of_links_is_an_error(loads_anew: None, monkeypatch: pytest.MonkeyPatch):
    assert (outcome(ring=False), outcome(ring=True)) == ("there", "there")
    number = signatures.interface()
    monkeypatch.setattr(signatures, "interface", lambda: number)
    monkeypatch.setitem(signatures.LINKS, "not_there", (None, []))
    assert outcome(ring=False) == "there"
    assert outcome(ring=True).startswith("NativeKernelsUnavailable: this build has no shared-memory links")
