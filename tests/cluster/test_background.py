"""What runs in the background ends, fails and begins anew with a word."""

from __future__ import annotations

import ast
import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from isotherm.cluster import background
from isotherm.cluster.background import Background, spawn_thread

ROOT = Path(__file__).resolve().parents[2]


def test_a_failure_is_logged_and_told(caplog):
    told = []

    async def main() -> None:
        async def fail() -> None:
            raise ValueError("no")

        task = Background(lambda name, error: told.append((name, str(error)))).spawn("a task", fail())
        await asyncio.wait([task])
        await asyncio.sleep(0)

    asyncio.run(main())
    assert told == [("a task", "no")]
    assert "a task failed" in caplog.text and "ValueError" in caplog.text


def test_what_is_kept_begins_anew_until_it_returns(monkeypatch, caplog):
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)
    runs = []

    async def work() -> None:
        runs.append(len(runs))
        if len(runs) < 4:
            raise OSError(f"failure {len(runs)}")

    async def main() -> None:
        await Background().keep("the watch", work)

    asyncio.run(main())
    assert runs == [0, 1, 2, 3]
    pauses = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert [m.rsplit(" ", 2)[1] for m in pauses] == ["0.001", "0.002", "0.004"]


def test_what_fails_for_days_is_begun_anew(monkeypatch):
    """1,025 failures in succession were an OverflowError of the pause, and the end."""
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.0)
    runs: list[int] = []

    async def work() -> None:
        runs.append(len(runs))
        if len(runs) <= 1100:
            raise OSError

    async def main() -> None:
        await Background().keep("the watch", work)

    asyncio.run(main())
    assert len(runs) == 1101


def test_closing_ends_everything_silently(caplog):
    async def main() -> list[asyncio.Task]:
        tasks = Background()
        spawned = [tasks.spawn("one", asyncio.sleep(100)), tasks.keep("two", lambda: asyncio.sleep(100))]
        await asyncio.sleep(0)
        await tasks.close()
        return spawned

    assert all(task.cancelled() for task in asyncio.run(main())) and not caplog.records


def test_a_thread_that_is_not_vital_only_says_so(caplog):
    def fail() -> None:
        raise KeyError("x")

    spawn_thread("reader", fail, vital=False).join()
    assert "thread reader failed" in caplog.text


def test_the_process_ends_with_a_vital_thread():
    program = """
import time, logging
logging.basicConfig()
from isotherm.cluster.background import spawn_thread
spawn_thread("step loop", lambda: 1 / 0)
time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (
        done.returncode == 1
        and "thread step loop failed; this process ends" in done.stderr
        and "ZeroDivisionError" in done.stderr
    )


def test_the_system_knows_a_thread_by_its_name():
    names = []

    def look() -> None:
        names.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())

    thread = spawn_thread("a name of more than fifteen bytes", look)
    thread.join()
    assert names == ["a name of more \n"]


# --- in the code ----------------------------------------------------------------------------------

BEGIN = {
    "Thread",
    "Timer",
    "create_task",
    "ensure_future",
    "run_coroutine_threadsafe",
    "run_in_executor",
    "start_new_thread",
}
# Who begins something and waits for its end itself, where its error then is raised.
WAIT_FOR_IT = {
    "Thread": {"cluster/text/grammar_vocabulary.py"},  # which needs a thread with another stack
    "ensure_future": {
        "cluster/api/batches/runner.py", "cluster/api/delta_streams.py", "cluster/api/events.py",
        "cluster/api/line/proxy_end.py", "cluster/api/stream.py", "cluster/cli/bench_load.py",
        "cluster/client/batch.py",
        "cluster/control/ingress_watch.py", "cluster/control/liveness.py", "cluster/control/startup.py",
        "cluster/control/transactions.py", "cluster/control/worker_watch.py", "cluster/deploy/places.py",
        "cluster/local/server.py", "cluster/routing/connection.py", "cluster/within.py",
    },
}  # fmt: skip


def begun(source: str) -> Iterator[tuple[str, bool]]:
    """What begins something beside the code that calls it, by the last part of its name; and whether nobody keeps what
    it gives, so that nobody can wait for it."""
    tree = ast.parse(source)
    dropped = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func).rpartition(".")[2]) in BEGIN:
            yield name, node in dropped


def test_nothing_else_runs_in_the_background():
    found: dict[str, set[str]] = {}
    for package in ("actors", "cluster", "kernels", "manifests"):
        for path in (ROOT / package).rglob("*.py"):
            label = str(path.relative_to(ROOT))
            for name, dropped in begun(path.read_text()) if label != "cluster/background.py" else ():
                assert not dropped, f"{label}: nobody waits for this {name}; spawn it"
                found.setdefault(name, set()).add(label)
    assert found == WAIT_FOR_IT


def test_what_would_run_in_the_background_is_seen():
    assert list(begun("asyncio.ensure_future(work())\ntask = loop.create_task(work())\nThread(target=f).start()")) == [
        ("ensure_future", True),
        ("create_task", False),
        ("Thread", False),
    ]
    (own,) = {name for name, _ in begun((ROOT / "cluster/background.py").read_text())} - {"Thread"}
    assert own == "create_task"
