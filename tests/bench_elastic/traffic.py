"""Steady traffic for the benchmarks of elasticity, and what a cluster says of itself meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx


@dataclass
class Traffic:
    """Streams that are always decoding: where one ends, the next begins. `prompts(stream, turn)` gives token ids or
    text."""

    url: str
    model: str
    streams: int
    tokens: int
    prompts: Callable[[int, int], Sequence[int] | str]
    temperature: float = 0.0
    chunked: bool = True  # false: each answer comes at its end, which spares the machine the work of a chunk per token
    errors: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=self.streams)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
            tasks = [asyncio.create_task(self._stream(client, i)) for i in range(self.streams)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while True:
            body = {
                "model": self.model,
                "prompt": self.prompts(number, turn),
                "max_tokens": self.tokens,
                "temperature": self.temperature,
                "seed": number,
                "ignore_eos": True,
                "stream": self.chunked,
            }
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    self.errors.append(f"HTTP {response.status_code}")
                async for chunk in response.aiter_raw():
                    if b'"error"' in chunk:
                        self.errors.append(chunk.decode())
            turn += 1


def random_prompts(vocabulary: int, length: int) -> Callable[[int, int], list[int]]:
    return lambda stream, turn: [random.Random(1000 * stream + turn).randrange(10, vocabulary) for _ in range(length)]


@dataclass(frozen=True)
class Sample:
    """One look at a cluster, `at` seconds after the traffic began. Counts are since the cluster's start."""

    at: float
    heat: float  # hottest group's rows / the mean group's, decayed
    version: int  # of the placement
    routed: list[list[int]]  # rows per layer and expert
    holders: list[list[list[str]]]
    tokens: int
    steps: int
    busy: dict[str, float]  # group → seconds computed
    rows: dict[str, int]  # group → rows computed
    waited: dict[str, float]  # group → seconds that shards could only wait for it


async def look(client: httpx.AsyncClient, begin: float) -> Sample:
    status, experts = await _get(client, "/status"), await _get(client, "/admin/experts")
    shards = [w for w in status["workers"] if w["role"] == "attention"]
    groups = {w["id"]: w for w in status["workers"] if w["role"] == "expert"}
    return Sample(
        time.perf_counter() - begin,
        max(experts["heat"].values()),
        experts["placement_version"],
        [layer["rows"] for layer in experts["layers"]],
        [layer["holders"] for layer in experts["layers"]],
        sum(w["tokens"] for w in shards),
        sum(w["steps"] for w in shards),
        {name: w["busy_seconds"] for name, w in groups.items()},
        {name: w["pairs"] for name, w in groups.items()},
        {name: sum(w["group_wait"].get(name, 0.0) for w in shards) for name in groups},
    )


async def _get(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    return (await client.get(path)).raise_for_status().json()


async def watch(url: str, seconds: float, period: float = 1.0) -> list[Sample]:
    """A look every `period`, the first one at once."""
    begin, samples = time.perf_counter(), []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while True:
            samples.append(await look(client, begin))
            if samples[-1].at >= seconds:
                return samples
            await asyncio.sleep(max(0.0, begin + len(samples) * period - time.perf_counter()))


def spread(counts: dict[str, float]) -> float:
    """The largest / the mean."""
    return max(counts.values()) * len(counts) / total if (total := sum(counts.values())) else 1.0


def imbalance(first: Sample, last: Sample) -> tuple[float, float]:
    """The rows that came in between, had the later placement been in force: hottest group / mean group over all layers,
    and the mean over layers."""
    groups = sorted(last.busy)
    layers = []
    for before, after, holders in zip(first.routed, last.routed, last.holders, strict=True):
        rows = dict.fromkeys(groups, 0.0)
        for a, b, held in zip(before, after, holders, strict=True):
            for group in held:
                rows[group] += (b - a) / len(held)
        layers.append(rows)
    total = {g: sum(rows[g] for rows in layers) for g in groups}
    return spread(total), sum(map(spread, layers)) / len(layers)


def loaded(samples: list[Sample]) -> int:
    """Copies that came to where they were not, from look to look."""
    count = 0
    for a, b in pairwise(samples):
        count += sum(
            len(set(y) - set(x))
            for old, new in zip(a.holders, b.holders, strict=True)
            for x, y in zip(old, new, strict=True)
        )
    return count


def between(first: Sample, last: Sample, what: str) -> dict[str, float]:
    """How much a count by group (`busy`, `rows` or `waited`) grew."""
    a, b = getattr(first, what), getattr(last, what)
    return {name: b[name] - a.get(name, 0) for name in b}
