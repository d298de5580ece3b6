"""`isotherm bench served`: tokens per second through HTTP beside those of the engine in one process, measured in turn.

Knows only HTTP and processes."""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from isotherm.cluster.cli.bench_load import LoadReport, LoadShape, run_load
from isotherm.cluster.cli.own_cluster import OwnCluster
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

ALONE = 64  # tokens of the request that runs alone
SHORT = 2  # tokens of the replies that are subtracted


class ServedError(IsothermError, RuntimeError):
    """The cluster refused the load."""


@contextmanager
def _endpoint(manifest: Mapping[str, Any]) -> Iterator[OwnCluster]:
    """A cluster of its own with this manifest. Raises OwnClusterError."""
    with tempfile.TemporaryDirectory(prefix="isotherm-bench-") as folder:
        (path := Path(folder) / "manifest.yaml").write_text(yaml.safe_dump(dict(manifest)))
        with OwnCluster(str(path)) as cluster:
            yield cluster


@dataclass(frozen=True)
class ServedFigure:
    """Tokens per second while all streams generate, with one kind of link, one value per round. `offline`: the engine
    in one process; `streamed`; `whole`: replies that come whole; both as the difference of two lengths, since events
    with several tokens each say too little of when a token was there. Milliseconds of a request alone, medians:
    `first_token_ms` and `token_ms`, from one token to the next."""

    links: str
    streams: int
    offline: tuple[float, ...]
    streamed: tuple[float, ...]
    whole: tuple[float, ...]
    first_token_ms: float
    token_ms: float

    def as_dict(self) -> JSON:
        """With the medians, and their ratios to the offline one."""
        medians = {name: statistics.median(getattr(self, name)) for name in ("offline", "streamed", "whole")}
        ratios = {f"{name}_ratio": medians[name] / medians["offline"] for name in ("streamed", "whole")}
        return {**asdict(self), **{f"{name}_median": value for name, value in medians.items()}, **ratios}


def bench_served(
    manifest: Mapping[str, Any], kinds: Sequence[str], shape: LoadShape, offline: Callable[[], float], rounds: int
) -> list[ServedFigure]:
    """Every kind of link with a cluster of its own: `rounds` times offline, streamed, whole and alone, in turn, after
    one round that is not counted. The cluster idles while the offline engine runs. Raises ServedError,
    OwnClusterError."""
    figures = []
    for kind in kinds:
        with _endpoint({**manifest, "links": {"kind": kind}}) as endpoint:
            model = httpx.get(f"{endpoint.url}/v1/models", timeout=10, trust_env=False).json()["data"][0]

            def load(shape: LoadShape, url: str = endpoint.url, model: Mapping[str, Any] = model) -> LoadReport:
                report = asyncio.run(run_load(url, model["id"], model["vocab_size"], shape))
                if report.failed:
                    raise ServedError(f"{report.failed} of {report.requests} requests failed: {report.first_error}")
                return report

            speeds: dict[str, list[float]] = {"offline": [], "streamed": [], "whole": []}
            alone: list[LoadReport] = []
            for round_ in range(rounds + 1):
                # Other prompts each time: none may be in the prefix cache.
                seeds = iter(range(5 * round_, 5 * round_ + 5))

                def speed(stream: bool, seeds: Iterator[int] = seeds) -> float:
                    of = replace(shape, rate=math.inf, stream=stream, token_ids=stream)
                    long = load(replace(of, seed=next(seeds))).seconds
                    short = load(replace(of, seed=next(seeds), output_tokens=SHORT)).seconds
                    return shape.requests * (shape.output_tokens - SHORT) / (long - short)

                values = {"offline": offline(), "streamed": speed(True), "whole": speed(False)}
                four = replace(shape, rate=math.inf, seed=next(seeds))
                single = load(replace(four, requests=1, output_tokens=min(ALONE, shape.output_tokens), token_ids=True))
                if round_:
                    alone.append(single)
                    for name, value in values.items():
                        speeds[name].append(value)
            figures.append(ServedFigure(
                kind, shape.requests, tuple(speeds["offline"]), tuple(speeds["streamed"]), tuple(speeds["whole"]),
                statistics.median(r.time_to_first_token_ms["p50"] for r in alone),
                statistics.median(1e3 / r.decode_tokens_per_s for r in alone),
            ))  # fmt: skip
    return figures
