"""`isotherm bench served`: tokens per second through HTTP beside those of the engine in one process, measured in turn.

Knows only HTTP and processes."""

from __future__ import annotations

import asyncio
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from isotherm.cluster.cli.bench_load import LoadReport, LoadShape, run_load
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

START_SECONDS, STOP_SECONDS = 600.0, 60.0
ALONE = 64  # tokens of the request that runs alone
SHORT = 2  # tokens of the replies that are subtracted


class ServedError(IsothermError, RuntimeError):
    """The cluster did not start, or refused the load."""


class Endpoint:
    """`isotherm serve` with a manifest as a process of its own, on a free port. Context manager: up when entered, gone
    when left. Raises ServedError."""

    def __init__(self, manifest: Mapping[str, Any]):
        self._manifest = dict(manifest)

    def __enter__(self) -> Endpoint:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(prefix="isotherm-bench-")
        path, self._log = Path(self._folder.name) / "manifest.yaml", Path(self._folder.name) / "serve.log"
        path.write_text(yaml.safe_dump(self._manifest | {"http": {"port": port}}))
        command = [sys.executable, "-c", "from isotherm.cluster.cli.main import main; main()", "serve", str(path)]
        with open(self._log, "w") as log:
            # A session of its own: who interrupts the bench has the cluster ended by __exit__, not twice.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServedError(
                    f"isotherm serve ended with status {self._process.returncode}:\n{self._log.read_text()}"
                )
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise ServedError(f"isotherm serve was not ready in {START_SECONDS:g} s:\n{self._log.read_text()}")

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # Not SIGINT: below a shell that has put the bench in the background it is ignored.
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


@dataclass(frozen=True)
class ServedFigure:
    """Tokens per second while all streams generate, with one kind of link, one value per round. `offline`: the engine
    in one process; `streamed`; `whole`: replies that come whole, the difference of two lengths. Milliseconds of a
    request alone, medians: `first_token_ms` and `token_ms`, from one token to the next."""

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
    one round that is not counted. The cluster idles while the offline engine runs. Raises ServedError."""
    figures = []
    for kind in kinds:
        with Endpoint({**manifest, "links": {"kind": kind}}) as endpoint:
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
                one, two, three, four = (replace(shape, rate=math.inf, seed=4 * round_ + i) for i in range(4))
                short = load(replace(two, stream=False, output_tokens=SHORT)).seconds
                whole = (
                    shape.requests
                    * (shape.output_tokens - SHORT)
                    / (load(replace(three, stream=False)).seconds - short)
                )
                values = {"offline": offline(), "streamed": load(one).decode_tokens_per_s, "whole": whole}
                single = load(replace(four, requests=1, output_tokens=min(ALONE, shape.output_tokens)))
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
