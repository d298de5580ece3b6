"""Load on a running endpoint: open-loop arrivals, with percentiles of time to first token and time between tokens.
Knows only HTTP.

Reads with aiohttp, which only benches need: an event costs it a third of what it costs httpx (26 against 85 µs of CPU),
and the load runs beside the server that it measures."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import aiohttp

from isotherm.cluster.errors import named_line
from isotherm.cluster.jsontypes import JSON


@dataclass(frozen=True)
class LoadShape:
    """`rate` requests per second, at random (Poisson) times whatever the server does; infinity: all at once. `stream`:
    replies come as events, else whole. `token_ids`: events have the tokens' ids, an extension of ours and of vLLM's: so
    each token makes one, even if it has no text, as where a tokenizer knows few of a model's tokens."""

    requests: int
    rate: float
    prompt_tokens: int
    output_tokens: int
    seed: int = 0
    stream: bool = True
    token_ids: bool = False


@dataclass
class StreamTimes:
    """Seconds of a monotonic clock: when the request was sent, and when each chunk with tokens came. A whole reply is
    one chunk."""

    begin: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class LoadReport:
    """Milliseconds at the 50th, 90th and 99th percentile. `decode_tokens_per_s`: see `decode_rate`."""

    requests: int
    failed: int
    seconds: float
    output_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_ms: dict[str, float]
    time_between_tokens_ms: dict[str, float]
    first_error: str

    def as_dict(self) -> JSON:
        return asdict(self)


async def run_load(
    url: str, model: str, vocab_size: int, shape: LoadShape, headers: Mapping[str, str] | None = None
) -> LoadReport:
    """Send the load and wait for every stream. Prompts are random token ids, all different."""
    rng = random.Random(shape.seed)
    connector, timeout = aiohttp.TCPConnector(limit=shape.requests), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as client:
        tasks = []
        begin = time.perf_counter()
        for _ in range(shape.requests):
            prompt = [rng.randrange(vocab_size) for _ in range(shape.prompt_tokens)]
            tasks.append(asyncio.ensure_future(_request(client, f"{url}/v1/completions", model, prompt, shape)))
            if math.isfinite(shape.rate):
                await asyncio.sleep(rng.expovariate(shape.rate))
        streams = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - begin
    good = [s for s in streams if not s.error]
    return LoadReport(
        requests=len(streams),
        failed=len(streams) - len(good),
        seconds=seconds,
        output_tokens_per_s=sum(s.tokens for s in good) / seconds,
        decode_tokens_per_s=decode_rate(good),
        time_to_first_token_ms=percentiles([s.chunks[0] - s.begin for s in good if s.chunks]),
        time_between_tokens_ms=percentiles([later - earlier for s in good for earlier, later in pairwise(s.chunks)]),
        first_error=next((s.error for s in streams if s.error), ""),
    )


def decode_rate(streams: Sequence[StreamTimes]) -> float:
    """Tokens per second while all streams were generating: from when the last of them had its first token until the
    first of them had its last. A stream's tokens after its first are taken to be spread evenly over its chunks. 0 where
    there was no such time, as with whole replies."""
    streams = [s for s in streams if s.chunks]  # tokens that make no text, such as special ones, come in no chunk
    begin, end = max((s.chunks[0] for s in streams), default=0.0), min((s.chunks[-1] for s in streams), default=0.0)
    if begin >= end:
        return 0.0
    tokens = sum((s.tokens - 1) * sum(begin < at <= end for at in s.chunks) / (len(s.chunks) - 1) for s in streams)
    return tokens / (end - begin)


async def _request(
    client: aiohttp.ClientSession, url: str, model: str, prompt: list[int], shape: LoadShape
) -> StreamTimes:
    body = {"model": model, "prompt": prompt, "max_tokens": shape.output_tokens, "temperature": 0, "ignore_eos": True}
    if shape.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if shape.token_ids:
        body["return_token_ids"] = True
    times = StreamTimes(begin=time.perf_counter())
    try:
        async with client.post(url, json=body) as response:
            if response.status != 200:
                times.error = f"HTTP {response.status}: {(await response.read())[:200]!r}"
            elif shape.stream:
                await _read_events(response.content, times)
            else:
                times.tokens = json.loads(await response.read())["usage"]["completion_tokens"]
                times.chunks.append(time.perf_counter())
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        times.error = named_line(error)
    return times


async def _read_events(content: aiohttp.StreamReader, times: StreamTimes) -> None:
    """Every event is parsed when it comes."""
    left = b""
    async for part in content.iter_any():
        *events, left = (left + part).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: {"):
                continue
            chunk = json.loads(event[6:])
            if "error" in chunk:
                times.error = str(chunk["error"])
                return
            if usage := chunk.get("usage"):
                times.tokens = usage["completion_tokens"]
            elif any(choice.get("text") or choice.get("finish_reason") is None for choice in chunk["choices"]):
                times.chunks.append(time.perf_counter())  # one that says how it ends has no tokens


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90, p99 in milliseconds by the nearest rank; empty for no values."""
    ordered = sorted(seconds)
    return (
        {f"p{p}": ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)] * 1e3 for p in (50, 90, 99)} if ordered else {}
    )
