"""`ray job submit -- isotherm batch`: a killed driver resumes, and each row is there once with what the endpoint
gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from programs import last_words, running
from pyarrow import Table, parquet
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from served import ISOTHERM, Served

pytestmark = pytest.mark.long

ROWS = 500


@pytest.fixture(scope="module")
def another_ray() -> Iterator[None]:
    """What any other Ray of this machine has: the port of its agent, at which jobs come in."""
    with socket.socket() as taken:
        with suppress(OSError):  # there is one
            taken.bind(("127.0.0.1", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT))
            taken.listen()
        yield


@pytest.fixture(scope="module")
def served(another_ray, tmp_path_factory):
    cluster = Served({}, tmp_path_factory.mktemp("batch"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


def submit(served: Served, folder: Path, *more: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """The README's own command line."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(folder), "--",
               ISOTHERM, "batch", "--input", str(folder / "in.jsonl"),
               "--output", str(folder / "out.jsonl"), *more]  # fmt: skip
    environment = os.environ | {"RAY_ADDRESS": served.status()["dashboard"], "RAY_AUTH_MODE": "token"}
    return running(command, environment)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_batch_survives_its_driver(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    requests = []
    for i in range(ROWS):
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"What is {i % 50} + {i // 50}?"}],
            "temperature": 0,
            "max_tokens": 40,
        }
        requests.append({"custom_id": f"row-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    requests[7]["body"]["max_tokens"] = -1  # a bad row is recorded and stops nothing
    (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in requests))

    with submit(served, folder, "--concurrency", "8") as first:
        deadline = time.monotonic() + 120
        while not ROWS // 8 < len(rows_of_lines(folder)) < ROWS:
            assert time.monotonic() < deadline and first.poll() is None, last_words(first)
            time.sleep(0.05)
        drivers = [
            p
            for p in psutil.process_iter(["cmdline"])
            if str(folder / "out.jsonl") in (p.info["cmdline"] or [])
            and "batch" in p.info["cmdline"]
            and "submit" not in p.info["cmdline"]
        ]
        assert drivers
        for driver in drivers:
            driver.kill()
        first.wait(60)
    done = len(rows_of_lines(folder))
    assert 0 < done < ROWS

    with submit(served, folder) as second:
        output = second.communicate(timeout=180)[0]
    # Every row is answered, one with an error: the job says so by its status.
    assert second.returncode != 0 and f"{ROWS} of {ROWS} rows done" in output and "1 with an error" in output, output
    results = rows_of(folder / "out.jsonl")
    assert sorted(r["custom_id"] for r in results) == sorted(r["custom_id"] for r in requests)
    by_id = {r["custom_id"]: r for r in results}
    assert by_id["row-7"]["response"]["status_code"] == 400
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for request in requests[::25]:
            direct = client.post(request["url"], json=request["body"]).json()
            assert by_id[request["custom_id"]]["response"]["body"]["choices"] == direct["choices"]


def test_tables_that_lie_elsewhere_are_read_by_ray_data(served, tmp_path_factory):
    """Beside the workers that serve, whatever CPUs these have reserved."""
    folder = tmp_path_factory.mktemp("tables")
    for part, begin in (("0", 0), ("1", 20)):
        rows = [
            {"messages": [{"role": "user", "content": f"What is {i} + 1?", "name": None}], "temperature": 0.0}
            for i in range(begin, begin + 20)
        ]
        (folder / "table").mkdir(exist_ok=True)
        parquet.write_table(Table.from_pylist(rows), folder / "table" / f"{part}.parquet")
    table = f"file://{folder}/table"
    done = served.command(
        "batch", "--input", table, "--output", str(folder / "out.jsonl"), "--url", served.url, timeout=280
    )
    assert done.returncode == 0 and "40 of 40 rows done" in done.stdout, done.stdout + done.stderr
    results = {one["custom_id"]: one["response"]["body"]["choices"][0] for one in rows_of(folder / "out.jsonl")}
    name = table.replace("/", "_")
    assert results[f"{name}:22"]["message"]["content"] == "21 + 1 = 22." and len(results) == 40
    wrong = served.command("batch", "--input", "file:///no/such/table", "--output", str(folder / "o"), timeout=280)
    assert wrong.returncode == 1 and "isotherm: file:///no/such/table: cannot be read" in wrong.stderr


def rows_of_lines(folder: Path) -> list[str]:
    path = folder / "out.jsonl"
    return path.read_text().splitlines() if path.exists() else []
