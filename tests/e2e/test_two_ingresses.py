"""Two ingress replicas on Ray: what one keeps the other finds, and a batch outlives the replica that runs it."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
from served import Served

pytestmark = pytest.mark.long

ROWS = 300
ASKED = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    http = {"replicas": 2, "batches": {"folder": str(folder), "concurrency": 4}}
    cluster = Served({"http": http, "attention": {"threads": 1}}, tmp_path_factory.mktemp("served"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served.url, timeout=120) as client:
        yield client


def replicas(served: Served) -> list[psutil.Process]:
    served.remember_processes()
    found = []
    for process in served._family.values():
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::ServeReplica") and process.is_running():
                found.append(process)
    return found


def both_there(served: Served) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while len(found := replicas(served)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def row(i: int) -> dict:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"What is {i} + 3?"}], "max_tokens": 48}
    fixed = {"temperature": 0, "ignore_eos": True}
    return {"custom_id": f"row {i}", "method": "POST", "url": "/v1/chat/completions", "body": {**body, **fixed}}


def runner(served: Served, folder: Path, batch: str) -> psutil.Process:
    """The replica that writes a batch's output."""
    deadline = time.monotonic() + 60
    output = folder / "batches" / batch / "output.jsonl"
    while time.monotonic() < deadline:
        for process in replicas(served):
            with contextlib.suppress(psutil.Error):
                if output.exists() and output.stat().st_size and str(output) in {f.path for f in process.open_files()}:
                    return process
        time.sleep(0.02)
    raise TimeoutError(f"nobody runs {batch}")


def test_a_batch_outlives_the_replica_that_runs_it_with_each_row_once(served, folder, client):
    both_there(served)
    lines = "\n".join(json.dumps(row(i)) for i in range(ROWS))
    file = client.post("/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "1h"}
    batch = client.post("/v1/batches", json=asked).raise_for_status().json()["id"]
    victim = runner(served, folder, batch)
    done_by_then = len((folder / "batches" / batch / "output.jsonl").read_bytes().splitlines())
    victim.kill()
    assert done_by_then < ROWS, "it was killed in mid batch"
    deadline = time.monotonic() + 180
    state: dict = {}
    while state.get("status") != "completed":
        assert time.monotonic() < deadline, state
        with contextlib.suppress(httpx.TransportError):  # connections may have been the dead replica's
            answer = client.get(f"/v1/batches/{batch}")
            state = answer.json() if answer.status_code == 200 else state
        time.sleep(0.2)
    assert state["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
    output = client.get(f"/v1/files/{state['output_file_id']}/content").content.splitlines()
    rows = [json.loads(line) for line in output]
    assert Counter(one["custom_id"] for one in rows) == Counter(f"row {i}" for i in range(ROWS))
    told = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in rows}
    for i in (0, done_by_then, ROWS - 1):
        alone = client.post("/v1/chat/completions", json=row(i)["body"]).json()
        assert told[f"row {i}"] == alone["choices"][0]["message"]["content"]


def test_a_response_is_found_by_whichever_replica_is_asked(served):
    """Asked over connections of their own, both replicas keep some; when one has died, all are there."""
    victim, _ = both_there(served)
    kept = []
    for i in range(12):
        body = {**ASKED, "input": f"My number is {i}.", "store": True}
        kept.append(httpx.post(f"{served.url}/v1/responses", json=body, timeout=60).raise_for_status().json()["id"])
    victim.kill()
    for response in kept:
        body = {**ASKED, "input": "What is my number?", "previous_response_id": response}
        answer = httpx.post(f"{served.url}/v1/responses", json=body, timeout=60)
        while answer.status_code == 503:  # by the proxy, until it knows that the replica has gone
            time.sleep(0.2)
            answer = httpx.post(f"{served.url}/v1/responses", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert said["previous_response_id"] == response
        alone = httpx.post(f"{served.url}/v1/responses", json={**body, "previous_response_id": None}, timeout=60)
        assert said["usage"]["input_tokens"] > alone.json()["usage"]["input_tokens"] + 8, "it goes on from the other"
