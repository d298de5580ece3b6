"""Peers of a link in processes of their own, to be killed and stopped. Forked from a server that has imported torch,
since a fresh Python takes seconds for that."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.experts.native_loop import NativeLoop
from isotherm.actors.experts.python_loop import PythonLoop
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.process_group import CPU, ProcessGroupServerLink, open_process_group
from isotherm.actors.links.protocol import Dispatch
from isotherm.actors.links.shared_memory import SharedMemoryLink, SharedMemoryServerLink, accept_shard, new_bell
from isotherm.actors.links.wire import Wire
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.ring import NativeGate
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import ReferenceKernels

MEETING = 20.0  # seconds
HUGE = 1 << 29  # bytes of a message: loopback takes a tenth of a second for it

_context = multiprocessing.get_context("forkserver")
# Not this module, which the server would not find: it imports what this one does.
_context.set_forkserver_preload(
    [
        "pytest",
        "isotherm.actors.experts.native_loop",
        "isotherm.actors.links.process_group",
        "isotherm.kernels.reference",
    ]
)


def make_worker(
    path: Path, native: bool, gate: bool = True, held: list[tuple[int, int]] | None = None, slots: int | None = None
) -> ExpertWorker:
    """A worker with every expert of a checkpoint, or with those in `held`."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    kernels: Kernels = NativeKernels(torch.float32, 1) if native else ReferenceKernels(torch.float32)
    held = [(layer, e) for layer in config.moe_layers for e in range(config.n_routed_experts)] if held is None else held
    worker = ExpertWorker(config, kernels, slots or len(held), NativeGate() if native and gate else None)
    with WeightReader(checkpoint) as reader:
        worker.load(reader, held)
    return worker


class Group:
    """An expert group without Ray: the native loop, or the Python server with reference kernels."""

    def __init__(self, worker: ExpertWorker, native: bool, window: float = 1.0) -> None:
        self.worker = worker
        self.server: Any = NativeLoop(worker, window) if native else PythonLoop(worker)

    def meet(self, shard: str, name: str) -> None:
        if isinstance(self.server, NativeLoop):
            self.server.attach(shard, accept_shard(name, self.server.bell, MEETING))
        else:
            bell = new_bell()
            self.server.attach(shard, SharedMemoryServerLink(accept_shard(name, bell, MEETING), bell))

    def close(self) -> None:
        if isinstance(self.server, NativeLoop):
            self.server.close()


def connect(group: Group, shard: str = "shard", nbytes: int = 1 << 16, timeout: float = 20.0) -> SharedMemoryLink:
    name = uuid.uuid4().hex
    meeting = threading.Thread(target=group.meet, args=(shard, name))
    meeting.start()
    link = SharedMemoryLink.open(name, nbytes, timeout, 20.0)
    meeting.join()
    return link


def ask(link: SharedMemoryLink, message: Dispatch) -> Tensor:
    link.send(message)
    return link.receive()


def random_message(config: Any, rng: np.random.Generator, rows: int, layer: int | None = None) -> Dispatch:
    """Rows for some experts of one layer, ragged."""
    layer = int(rng.choice(config.moe_layers)) if layer is None else layer
    active = int(rng.integers(1, config.n_routed_experts + 1)) if rows else 0
    experts = np.sort(rng.choice(config.n_routed_experts, active, replace=False)).astype(np.int32)
    counts = rng.integers(0, rows + 1, active)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    x = torch.from_numpy(rng.standard_normal((rows, config.hidden_size), dtype=np.float32))
    return Dispatch(layer, 1, x, rng.integers(0, max(rows, 1), offsets[-1]).astype(np.int32), experts, offsets)


def serve_group(path: Path, name: str, native: bool) -> None:
    torch.set_num_threads(1)
    group = Group(make_worker(path, native), native)
    group.meet("shard", name)
    time.sleep(1000)


def serve_process_group(path: Path, host: str, port: int, prefix: str) -> None:
    torch.set_num_threads(1)
    worker = make_worker(path, native=False)
    group = open_process_group(host, port, prefix, 1, host, MEETING)
    PythonLoop(worker).attach("shard", ProcessGroupServerLink(group, worker.config.hidden_size))
    time.sleep(1000)


def open_wire(port: int, prefix: str, rank: int) -> Wire:
    return Wire(open_process_group("127.0.0.1", port, prefix, rank, "127.0.0.1", MEETING), 1 - rank, CPU, None)


def send_hugely(port: int, prefix: str) -> None:
    wire = open_wire(port, prefix, 1)
    wire.send(1, (7,), torch.ones(HUGE, dtype=torch.uint8))
    time.sleep(1000)


def die_while_receiving(port: int, prefix: str) -> None:
    wire = open_wire(port, prefix, 1)
    kill_at_first_byte(wire, os.getpid())
    wire.receive(timedelta(seconds=MEETING))


def kill_at_first_byte(wire: Wire, pid: int) -> list[float]:
    """Kill a process when the first byte of a huge body has come over the wire; the moment at which that was."""
    body, killed = torch.zeros(HUGE, dtype=torch.uint8), []
    wire._incoming.take = lambda nbytes: body[:nbytes]  # type: ignore[method-assign]

    def kill() -> None:
        deadline = time.monotonic() + MEETING
        while not body[0] and time.monotonic() < deadline:
            pass
        os.kill(pid, signal.SIGKILL)
        killed.append(time.perf_counter())

    threading.Thread(target=kill, daemon=True).start()
    return killed


def run_shard(path: Path, name: str, seed: int) -> None:
    torch.set_num_threads(1)
    config, rng = Checkpoint.open(path).config, np.random.default_rng(seed)
    link = SharedMemoryLink.open(name, 1 << 16, 30.0, MEETING)
    while True:
        link.in_step(bool(rng.integers(2)))
        link.send(random_message(config, rng, int(rng.integers(0, 40))))
        link.receive()


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """The pid of a process that runs `target`; gone at the end."""
    child = _context.Process(target=target, args=arguments, daemon=True)
    child.start()
    assert child.pid is not None
    try:
        yield child.pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.join(10)


def random_pause(rng: random.Random) -> float:
    """Mostly short, so that kills fall into every phase of a round trip."""
    return rng.random() ** 3 * 0.03
