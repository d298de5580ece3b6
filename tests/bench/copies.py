"""An expert copied from a peer's memory beside one read from the checkpoint, in turn, with the CPU time of both ends;
and how long the peer's own computations take meanwhile: `python tests/bench/copies.py DIR [--experts int4]`.

DIR as tests/bench/make_checkpoint.py writes it. The peer is a process of its own, which holds the experts; each end has
half of the cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from isotherm.actors.experts.copy_server import CopyServer
from isotherm.actors.experts.expert_loads import ExpertLoads
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.messages.copies import CopySource
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.native.backend import NativeKernels

SIDES = ("cached", "not cached", "unix", "tcp")
ROWS, STEP = 16, 16  # rows for each expert, and experts, of one of the peer's steps
TAG = "bench"


class Bench:
    def __init__(self, path: Path, choice: WeightChoice, count: int):
        self.path, self.choice = path, choice
        self.checkpoint = Checkpoint.open(path)
        config = self.checkpoint.config
        pairs = [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)]
        self.pairs = pairs[:count]
        self.kernels = NativeKernels(torch.bfloat16, 1)

    def worker(self) -> ExpertWorker:
        return ExpertWorker(self.checkpoint.config, self.kernels, len(self.pairs))

    def reader(self) -> WeightReader:
        return WeightReader(self.checkpoint, self.choice)


def keep_to_half(which: int) -> None:
    cores = range(os.cpu_count() or 1)
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[which::2])


def serve(pipe: Connection, bench: tuple[Path, WeightChoice, int]) -> None:
    """The peer: answers what is asked through the pipe."""
    keep_to_half(0)
    own = Bench(*bench)
    worker = own.worker()
    with own.reader() as reader:
        worker.load(reader, own.pairs)
    servers = {"unix": CopyServer(worker, TAG, None), "tcp": CopyServer(worker, TAG, "127.0.0.1")}
    busy, took = threading.Event(), list[float]()
    threading.Thread(target=compute, args=(own, worker, busy, took), daemon=True).start()
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            asked = pipe.recv()
            if asked == "cpu":
                pipe.send(time.process_time())
            elif asked == "begin":
                took.clear()
                busy.set()
                pipe.send(None)
            elif asked == "end":
                busy.clear()
                pipe.send(list(took))
            else:
                pipe.send(servers[asked].offer("peer"))


def compute(own: Bench, worker: ExpertWorker, busy: threading.Event, took: list[float]) -> None:
    x = torch.randn(ROWS, own.checkpoint.config.hidden_size).to(torch.bfloat16)
    experts = min(STEP, len(own.pairs))
    rows = torch.arange(ROWS, dtype=torch.int32).repeat(experts)
    slots = torch.arange(experts, dtype=torch.int32)
    offsets = torch.arange(experts + 1, dtype=torch.int32) * ROWS
    while busy.wait():
        begin = time.perf_counter()
        own.kernels.experts(x, worker.bank, rows, slots, offsets)
        took.append(time.perf_counter() - begin)


def load(own: Bench, worker: ExpertWorker, side: str, ask: Callable[[str], object], count: int) -> str:
    """One load of so many experts; what it took."""
    files, pairs = own.path.glob("*.safetensors"), own.pairs[:count]
    for file in files if side in ("cached", "not cached") else ():
        with open(file, "rb", buffering=0) as stream:
            if side == "not cached":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while side == "cached" and stream.read(1 << 20):
                pass
    copied = side in ("unix", "tcp")
    sources = [CopySource(ask(side), tuple(pairs))] if copied else []  # type: ignore[arg-type]
    loads = ExpertLoads(worker, "peer" if copied else "checkpoint")
    peer, cpu, begin = ask("cpu"), time.process_time(), time.monotonic()
    with own.reader() as reader:
        loads.load(reader, pairs, sources, TAG)
    seconds, cpu, peer = time.monotonic() - begin, time.process_time() - cpu, ask("cpu") - peer  # type: ignore[operator]
    assert set(loads.told()) == {"peer" if copied else "checkpoint"}
    each = [f"{x / count * 1e3:8.2f}" for x in (seconds, cpu, peer)]
    for pair in pairs:
        worker.drop(*pair)
    return f"{each[0]} ms, {worker_rate(own, count, seconds)}, CPU time{each[1]} ms, the peer's{each[2]} ms"


def worker_rate(own: Bench, count: int, seconds: float) -> str:
    names = [name for pair in own.pairs[:count] for name in own.checkpoint.config.expert_projections(*pair)]
    stored = sum(info.nbytes for name in names for info in own.checkpoint.tensors_of(name).values())
    return f"{stored / seconds / 1e6:6.0f} MB of the checkpoint/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--experts", choices=["stored", "int4"], default="stored")
    parser.add_argument("--count", type=int, default=64, help="experts of one load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="for which the peer's steps are timed, each time")
    a = parser.parse_args()
    told = (a.path.resolve(), WeightChoice(experts=a.experts), a.count)
    keep_to_half(1)
    own = Bench(*told)
    pipe, other = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=serve, args=(other, told), daemon=True).start()

    def ask(what: str) -> object:
        pipe.send(what)
        return pipe.recv()

    pipe.recv()
    worker = own.worker()
    print(f"an expert, of {a.count} loaded at once")
    for _ in range(a.rounds):
        for side in SIDES:
            print(f"  {side:10} {load(own, worker, side, ask, a.count)}", flush=True)
    print(f"the peer's steps of {ROWS} rows for each of {min(STEP, a.count)} experts")
    for _ in range(a.rounds):
        for side in (None, "unix", "cached"):
            ask("begin")
            until, loads = time.monotonic() + a.seconds, 0
            while time.monotonic() < until:
                time.sleep(0.05) if side is None else load(own, worker, side, ask, min(STEP, a.count))
                loads += side is not None
            took = ask("end")
            assert isinstance(took, list)
            words = {None: "alone", "unix": "copied from", "cached": "another one reads"}[side]
            median, high = statistics.median(took) * 1e3, statistics.quantiles(took, n=20)[-1] * 1e3
            figures = f"median {median:6.2f} ms, 95th {high:6.2f} ms, {len(took)} steps, {loads} loads"
            print(f"  {words:18} {figures}", flush=True)


if __name__ == "__main__":
    main()
