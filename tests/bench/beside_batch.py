"""One stream that somebody waits for, beside a batch of 5,000 rows: how fast it is, and how fast the batch.

python tests/bench/beside_batch.py [--rows 5000] [--rounds 5] [--tokens 400]

Serves the bundled model without Ray, and measures the stream in turn: alone, and while the batch runs, which is asked
through /v1/files and /v1/batches. Fails where the stream keeps less than 80 % of its speed (medians of the rounds)."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from alone_served import alone_served  # noqa: E402


def stream(client: httpx.Client, tokens: int) -> tuple[float, float]:
    """Tokens per second after the first piece, and seconds to that."""
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    begin = time.perf_counter()
    first = 0.0
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter()
    return (tokens - 1) / (time.perf_counter() - first), first - begin


def batch(client: httpx.Client, rows: int) -> str:
    lines = "\n".join(
        json.dumps(
            {
                "custom_id": f"row {i}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": f"What is {i} + {i % 7}? Tell it in words."}],
                    "max_tokens": 64,
                    "ignore_eos": True,
                },
            }
        )
        for i in range(rows)
    )
    file = client.post("/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return str(client.post("/v1/batches", json=asked).raise_for_status().json()["id"])


def completed(client: httpx.Client, name: str) -> int:
    return int(client.get(f"/v1/batches/{name}").json()["request_counts"]["completed"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {"alone": [], "beside": []}
    firsts: dict[str, list[float]] = {"alone": [], "beside": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        alone_served(Path(folder)) as (port, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        stream(client, options.tokens)
        for _ in range(options.rounds):
            _measure(client, options.tokens, speeds["alone"], firsts["alone"])
        name = batch(client, options.rows)
        while not completed(client, name):
            time.sleep(0.2)
        begin, before = time.perf_counter(), completed(client, name)
        time.sleep(5.0)
        alone = (completed(client, name) - before) / (time.perf_counter() - begin)
        begin, before = time.perf_counter(), completed(client, name)
        for _ in range(options.rounds):
            _measure(client, options.tokens, speeds["beside"], firsts["beside"])
        beside = (completed(client, name) - before) / (time.perf_counter() - begin)
        running = client.get(f"/v1/batches/{name}").json()["status"] == "in_progress"
        client.post(f"/v1/batches/{name}/cancel")
    medians = {which: statistics.median(of) for which, of in speeds.items()}
    kept = medians["beside"] / medians["alone"]
    for which, of in speeds.items():
        told = ", ".join(f"{speed:.0f}" for speed in of)
        print(f"{which:>7}: {medians[which]:.0f} tok/s ({told}), first piece {statistics.median(firsts[which]):.3f} s")
    print(f"the stream keeps {kept:.1%}; the batch {alone:.1f} rows/s by itself, {beside:.1f} beside it")
    if not running:
        print("the batch was over before the last round: give it more rows")
    return int(not running or kept < 0.8)


def _measure(client: httpx.Client, tokens: int, speeds: list[float], firsts: list[float]) -> None:
    speed, first = stream(client, tokens)
    speeds.append(speed)
    firsts.append(first)


if __name__ == "__main__":
    sys.exit(main())
