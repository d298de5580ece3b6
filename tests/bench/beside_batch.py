"""One stream that somebody waits for, beside a batch of 5,000 rows: how fast it is, and how fast the batch.

python tests/bench/beside_batch.py [--rows 5000] [--rounds 5] [--streams 3] [--tokens 400]

Serves the bundled model without Ray, and measures the stream in turn: alone, and while the batch runs, which is asked
through /v1/files and /v1/batches. Fails where the stream keeps less than 80 % of its speed (medians of the rounds)."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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


def state(client: httpx.Client, name: str) -> tuple[str, int]:
    """A batch's status, and its rows that are done."""
    said = client.get(f"/v1/batches/{name}").json()
    return said["status"], said["request_counts"]["completed"]


def one_round(client: httpx.Client, options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second and seconds to the first piece, alone and beside a batch; rows per second."""
    found: dict[str, list[float]] = {}
    found["alone"], found["first alone"] = _measure(client, options)
    name = batch(client, options.rows)
    while not state(client, name)[1]:
        time.sleep(0.1)
    found["rows by itself"] = [_rows(client, name, lambda: time.sleep(2.0))]
    measured: list[tuple[list[float], list[float]]] = []
    found["rows beside"] = [_rows(client, name, lambda: measured.append(_measure(client, options)))]
    found["beside"], found["first beside"] = measured[0]
    if state(client, name)[0] != "in_progress":
        raise RuntimeError("the batch was over too soon: give it more rows")
    client.post(f"/v1/batches/{name}/cancel")
    while state(client, name)[0] != "cancelled":
        time.sleep(0.1)
    return found


def _measure(client: httpx.Client, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    speeds, firsts = zip(*(stream(client, options.tokens) for _ in range(options.streams)), strict=True)
    return list(speeds), list(firsts)


def _rows(client: httpx.Client, name: str, meanwhile: Callable[[], object]) -> float:
    begin, before = time.perf_counter(), state(client, name)[1]
    meanwhile()
    return (state(client, name)[1] - before) / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=3, help="that are measured in turn in each round")
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        alone_served(Path(folder)) as (port, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        stream(client, options.tokens)
        rounds = []
        for _ in range(options.rounds):
            rounds.append(one_round(client, options))
            said = {name: statistics.median(values) for name, values in rounds[-1].items()}
            print(
                f"{said['alone']:6.0f} tok/s alone, {said['beside']:6.0f} beside the batch "
                f"({said['beside'] / said['alone']:.0%}); "
                f"first piece {said['first alone'] * 1e3:.0f} and {said['first beside'] * 1e3:.0f} ms; "
                f"{said['rows by itself']:.1f} rows/s without the stream, {said['rows beside']:.1f} beside it",
                flush=True,
            )
    alone, beside = (statistics.median(speed for of in rounds for speed in of[name]) for name in ("alone", "beside"))
    print(f"the stream keeps {beside / alone:.1%} of {alone:.0f} tok/s")
    return int(beside < 0.8 * alone)


if __name__ == "__main__":
    sys.exit(main())
