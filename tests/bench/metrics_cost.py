"""What the metrics cost: two servers of the bundled model, without Ray, of which one counts nothing.

python tests/bench/metrics_cost.py [--rounds 60] [--streams 16] [--requests 64] [--tokens 100]

Both stand all the time and are measured in turn, the one that comes first changing; the one that counts is scraped once
a round, in its burst. Fails where it gives less than 99 % of the other's tokens per second (medians of the rounds: one
round differs from the next by several per cent)."""

from __future__ import annotations

import argparse
import asyncio
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
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        alone_served(Path(one)) as (counting, _),
        alone_served(Path(other), figures=False) as (plain, _),
    ):
        for i in range(-2, chosen.rounds):
            for counts in (True, False) if i % 2 else (False, True):
                port = counting if counts else plain
                speed = asyncio.run(burst(port, chosen.streams, chosen.requests, chosen.tokens, scrape=counts))
                if i >= 0:
                    speeds[counts].append(speed)
    counted, uncounted = (statistics.median(speeds[counts]) for counts in (True, False))
    kept = counted / uncounted
    print(f"{counted:,.0f} tokens/s counted, {uncounted:,.0f} without, in {chosen.rounds} rounds: {kept:.3f}")
    if kept < 0.99:
        raise SystemExit("metrics cost more than 1 %")


if __name__ == "__main__":
    main()
