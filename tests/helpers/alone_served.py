"""The bundled model served without Ray, behind the gate that Serve's proxy has, in a process of its own: `python
alone_served.py PORT FOLDER [KEYS]`. Files and batches are in the folder; KEYS, JSON of names and weights, makes
`Authorization: Bearer NAME` a key of that weight. After SIGUSR1 nothing is counted of requests and steps, until
SIGUSR2: that shows what counting costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import uvicorn
from starlette.requests import HTTPConnection

from isotherm.actors.attention.step_figures import StepFigures
from isotherm.actors.local import local_engine
from isotherm.actors.models.weights import parse_dtype
from isotherm.cluster.api import behalf
from isotherm.cluster.api.access.caller import ANYONE, Caller
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.gate import GateMiddleware
from isotherm.cluster.api.request_book import RequestRecord
from isotherm.cluster.api.slow_clients import SlowClientMiddleware
from isotherm.cluster.cli.own_cluster import free_port
from isotherm.cluster.engine.sequence import Chunk
from isotherm.cluster.front_door import front_door
from isotherm.cluster.local.engine import LocalEngine
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.observe.alone import Alone
from isotherm.cluster.observe.ingress import IngressObserver
from isotherm.cluster.observe.request_figures import RequestFigures
from isotherm.cluster.served_model import served_model
from isotherm.kernels.select import select_kernels


async def serve(port: int, folder: Path) -> None:
    manifest, path = served_model("tiny", admin="open", metrics="open")
    checkpoint = Checkpoint.open(path)
    kernels = select_kernels(manifest.kernels, parse_dtype(manifest.dtype), device=manifest.device).kernels
    scheduler = manifest.scheduler_config(checkpoint.config)
    engine = LocalEngine(local_engine(checkpoint, kernels, scheduler), checkpoint.config.vocab_size, "alone", "")
    batches = BatchService(Store(folder, 1 << 30, 86400), BatchLimits(), 8 << 20)
    alone = Alone(engine.meter, lambda: engine.not_ready() is None)
    observer = IngressObserver.of(manifest, "alone", alone, logs=False)
    app = front_door(manifest, path, engine, batches=batches, observer=observer)
    batches.begin()
    config = uvicorn.Config(SlowClientMiddleware(GateMiddleware(app)), port=port, log_level="error", lifespan="off")
    try:
        await uvicorn.Server(config).serve()
    finally:
        engine.close()


@contextlib.contextmanager
def alone_served(folder: Path, keys: dict[str, float] | None = None) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port and the process of one."""
    port = free_port()
    arguments = [str(port), str(folder), *([json.dumps(keys)] if keys else [])]
    process = subprocess.Popen([sys.executable, __file__, *arguments])
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server has not started (its status is {process.poll()})")
            time.sleep(0.1)
        yield port, process
    finally:
        process.terminate()
        process.wait(30)


def _by_bearer(weights: dict[str, float]) -> None:
    def caller(request: HTTPConnection) -> Caller:
        name = request.headers.get("authorization", "").removeprefix("Bearer ")
        return Caller(name, tenant=name, weight=weights[name]) if name else ANYONE

    behalf.caller_of = caller


def _count_by_signals() -> None:
    take, add, counting = RequestFigures.take, StepFigures.add, [True]

    def take_or_not(self: RequestFigures, record: RequestRecord) -> None:
        if counting[0]:
            take(self, record)

    def add_or_not(self: StepFigures, chunks: Sequence[Chunk], seconds: float, waited: float) -> None:
        if counting[0]:
            add(self, chunks, seconds, waited)

    RequestFigures.take, StepFigures.add = take_or_not, add_or_not  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: counting.__setitem__(0, False))
    signal.signal(signal.SIGUSR2, lambda *_: counting.__setitem__(0, True))


if __name__ == "__main__":
    _count_by_signals()
    if len(sys.argv) > 3:
        _by_bearer(json.loads(sys.argv[3]))
    asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2])))
