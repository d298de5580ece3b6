"""What the metrics cost: a server of the bundled model, without Ray, that counts and does not count in turn.

python tests/bench/metrics_cost.py [--rounds 60] [--streams 16] [--requests 64] [--tokens 100]

One process, since two of one build differ by several per cent; which comes first changes from round to round, and every
tenth round, some ten seconds after the last, the metrics are read. Fails where counting leaves less than 99 % of the
tokens per second without it (medians of the rounds)."""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from alone_served import alone_served  # noqa: E402


async def burst(port: int, streams: int, requests: int, tokens: int, scrape: bool) -> float:
    """Tokens per second of so many requests, so many at a time."""
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    places = asyncio.Semaphore(streams)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def ask() -> int:
            async with places:
                reply = await client.post("/v1/completions", json=body)
                return int(reply.raise_for_status().json()["usage"]["completion_tokens"])

        begin = time.perf_counter()
        asked = [asyncio.ensure_future(ask()) for _ in range(requests)]
        if scrape:
            (await client.get("/metrics")).raise_for_status()
        return sum(await asyncio.gather(*asked)) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    chosen = parser.parse_args()
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder, alone_served(Path(folder)) as (port, process):
        for i in range(-2, chosen.rounds):
            for counts in (True, False) if i % 2 else (False, True):
                process.send_signal(signal.SIGUSR2 if counts else signal.SIGUSR1)
                scrape = counts and i % 10 == 0
                speed = asyncio.run(burst(port, chosen.streams, chosen.requests, chosen.tokens, scrape))
                if i >= 0:
                    speeds[counts].append(speed)
    counted, uncounted = (statistics.median(speeds[counts]) for counts in (True, False))
    kept = counted / uncounted
    print(f"{counted:,.0f} tokens/s counted, {uncounted:,.0f} without, in {chosen.rounds} rounds: {kept:.3f}")
    if kept < 0.99:
        raise SystemExit("metrics cost more than 1 %")


if __name__ == "__main__":
    main()
