"""Round trips of dispatch messages over each kind of link, between this process and one other.

The other process is an expert group without Ray: the same loops, over experts of width 1, so that there is little to
compute. How much (outputs must be written all the same) the in-process link shows.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from isotherm.actors.attention.row_split import layer_tables, split_rows
from isotherm.actors.experts.native_loop import NativeLoop
from isotherm.actors.experts.python_loop import PythonLoop
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.in_process import InProcessLink
from isotherm.actors.links.protocol import Dispatch, Link, LinkEnd, LinkError, Loops
from isotherm.actors.links.registry import carrier, own_locality
from isotherm.actors.links.rendezvous import Rendezvous
from isotherm.cluster.control.link_choice import RULES
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.workers import Meeting
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.registry import parse
from isotherm.cluster.placement.table import contiguous_placement
from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.native import ring as native_ring
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.select import select_kernels

HOST = "127.0.0.1"
MEETING = 60.0  # seconds for the other process to start and to meet
SILENCE = 30.0  # seconds
WARM_UP = 10  # round trips that are not counted


@dataclass(frozen=True)
class LinkShape:
    """What messages are like: `rows` rows of `hidden` elements, each to `top_k` of `experts` experts chosen at
    random."""

    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class LinkFigure:
    """Round trips of one message. `microseconds`: the median; `mb_per_s`: bytes of rows and outputs over it."""

    name: str
    rows: int
    pairs: int
    microseconds: float
    p99_microseconds: float
    mb_per_s: float

    def as_dict(self) -> JSON:
        return asdict(self)


def bench_links(shape: LinkShape, rows: Sequence[int], trips: int) -> tuple[list[LinkFigure], str | None]:
    """Figures of every kind of link at every size; and why there are none in shared memory, where there are none.
    Raises LinkError."""
    messages = [_message(shape, count) for count in rows]
    own = _narrow_worker(shape, native_gate=False)
    figures = _measure(InProcessLink.kind, InProcessLink(own.compute), shape, messages, trips)
    with _links(shape, max(rows)) as links:
        for name, link in links:
            figures += _measure(name, link, shape, messages, trips)
    return figures, native_ring.unavailable_reason()


def _message(shape: LinkShape, rows: int) -> Dispatch:
    """As a shard would send it to its only group."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, shape.experts, generator=generator).topk(shape.top_k).indices.sort().values.int()
    (share,) = split_rows(ids.numpy(), layer_tables(contiguous_placement([0], shape.experts, ["peer"]), ("peer",))[0])
    x = torch.randn(rows, shape.hidden, generator=generator).to(shape.dtype)
    return Dispatch(0, 1, x, share.rows_P, share.experts_A, share.offsets_A1)


def _measure(name: str, link: Link, shape: LinkShape, messages: Sequence[Dispatch], trips: int) -> list[LinkFigure]:
    figures = []
    link.in_step(True)
    for message in messages:
        times = []
        for trip in range(WARM_UP + trips):
            begin = time.perf_counter()
            link.send(message)
            link.receive()
            if trip >= WARM_UP:
                times.append(time.perf_counter() - begin)
        median, pairs = statistics.median(times) * 1e6, len(message.rows_P)
        nbytes = (len(message.x_UD) + pairs) * shape.hidden * shape.dtype.itemsize
        figures.append(
            LinkFigure(name, len(message.x_UD), pairs, median, float(np.quantile(times, 0.99)) * 1e6, nbytes / median)
        )
    link.in_step(False)
    return figures


@contextmanager
def _links(shape: LinkShape, most_rows: int) -> Iterator[list[tuple[str, Link]]]:
    """Links of every kind that two processes of this machine can have to a process of its own, which ends with this
    context or with this process. One that the native loop serves is there a second time, served by the Python one."""
    rendezvous, here = Rendezvous(HOST), own_locality()
    kinds = [rule.kind for rule in RULES if rule.refusal(here, here) is None]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=_serve, args=(shape, theirs), daemon=True)
    peer.start()
    theirs.close()
    links: list[tuple[str, Link]] = []

    def open_link(kind: str, native: bool) -> bool:
        """Whether the native loop serves it."""
        meeting = Meeting(rendezvous.host, rendezvous.port, uuid.uuid4().hex, MEETING, kind)
        ours.send((meeting, native))
        link = carrier(kind).open(meeting, _end(shape), most_rows)
        served_natively: bool = ours.recv()
        links.append((link.kind if native else f"{link.kind} (Python loop)", link))
        return served_natively

    try:
        try:
            ours.recv()  # once it has begun
        except EOFError:
            raise LinkError("the other process ended before it could be met") from None
        for kind in kinds:
            if open_link(kind, native=True):
                open_link(kind, native=False)
        yield links
    finally:
        for _, link in links:
            link.close()
        ours.close()
        peer.join(10)
        peer.kill()
        peer.join()


def _end(shape: LinkShape) -> LinkEnd:
    return LinkEnd(
        host=HOST,
        device=torch.device("cpu"),
        dtype=shape.dtype,
        width=shape.hidden,
        top_k=shape.top_k,
        timeout=SILENCE,
    )


# --- the other process ----------------------------------------------------------------------------


def _serve(shape: LinkShape, parent: Connection) -> None:
    """Serve the links that the parent asks for, until it closes its end of the pipe."""
    logging.disable()  # links that close, and at the end the one that does not
    torch.set_num_threads(1)
    can_share = native_ring.unavailable_reason() is None
    worker = _narrow_worker(shape, native_gate=can_share)
    server = PythonLoop(worker)
    loop = NativeLoop(worker, window=1.0) if can_share and isinstance(worker.kernels, NativeKernels) else None
    parent.send(True)
    with suppress(EOFError):
        while True:
            meeting, native = parent.recv()
            carrier(meeting.kind).accept(meeting, _end(shape), meeting.prefix, Loops(server, loop if native else None))
            parent.send(loop is not None and meeting.prefix in loop.links())
    os._exit(0)  # without waiting for threads that serve links for ever


def _narrow_worker(shape: LinkShape, native_gate: bool) -> ExpertWorker:
    """Experts of width 1 with one thread."""
    config = _narrow_config(shape)
    worker = ExpertWorker(
        config,
        select_kernels("auto", shape.dtype, 1).kernels,
        shape.experts,
        native_ring.NativeGate() if native_gate else None,
    )
    narrow, down = torch.zeros(1, shape.hidden, dtype=shape.dtype), torch.zeros(shape.hidden, 1, dtype=shape.dtype)
    for expert in range(shape.experts):
        worker.bank.load(expert, PlainWeight(narrow), PlainWeight(narrow), PlainWeight(down))
    worker.slot_of[0] = np.arange(shape.experts)
    return worker


def _narrow_config(shape: LinkShape) -> ModelConfig:
    """One MoE layer; what is not about experts does not matter."""
    ones = ("vocab_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
            "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")  # fmt: skip
    fields = {
        "model_type": "deepseek_v3",
        "hidden_size": shape.hidden,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
    }
    return parse(dict.fromkeys(ones, 1) | fields | {"qk_rope_head_dim": 2}, Path("isotherm bench links"))
