"""Kernel speeds beside what this machine can do at all: GB/s against a measured stream read, GFLOP/s against torch's
own matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from isotherm.cluster.jsontypes import JSON
from isotherm.kernels.formats.registry import quantised
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.ops import Kernels

FORMS = ("bf16", "fp8", "int8", "int6", "int4")  # of weights
COLD_BYTES = 512 << 20  # weights are taken in turn from at least this much, so that none stays in a cache


@dataclass(frozen=True)
class KernelFigure:
    """Medians over the runs. `gb_per_s`: weight bytes as the kernels keep them; `gflop_per_s`: two operations per
    weight and row."""

    name: str
    weights: str
    rows: int
    microseconds: float
    gb_per_s: float
    gflop_per_s: float

    def as_dict(self) -> JSON:
        return asdict(self)


def _median_seconds(call: Callable[[int], object], runs: int) -> float:
    call(0)
    times = []
    for i in range(runs):
        begin = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def stream_bandwidth(runs: int = 7) -> float:
    """GB/s of reading 1 GiB with torch's threads, as a sum of int64. No upper bound: on AVX2 our kernels, which fetch
    ahead, have read a third more."""
    data = torch.ones(1 << 27, dtype=torch.int64)
    return data.nbytes / _median_seconds(lambda _: data.sum(), runs) / 1e9


def matmul_peak(runs: int = 5, size: int = 2048) -> float:
    """GFLOP/s of torch's matrix product, size × size × size, in bfloat16 or in float32, whichever is quicker here:
    without instructions for bfloat16 torch takes minutes for one such product."""

    def speed(dtype: torch.dtype, runs: int, size: int) -> float:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        return 2 * size**3 / _median_seconds(lambda _: a @ b, runs) / 1e9

    return speed(max((torch.bfloat16, torch.float32), key=lambda dtype: speed(dtype, 3, size // 8)), runs, size)


def random_weight(outputs: int, inputs: int, form: str, generator: torch.Generator) -> StoredWeight:
    """In one of FORMS."""
    weight = PlainWeight((torch.randn(outputs, inputs, generator=generator) / inputs**0.5).bfloat16())
    return weight if form == "bf16" else quantised(form, weight)


def bench_linear(
    kernels: Kernels, outputs: int, inputs: int, form: str, rows: list[int], runs: int = 15
) -> list[KernelFigure]:
    """`linear` with cold weights."""
    generator = torch.Generator().manual_seed(0)
    stored = random_weight(outputs, inputs, form, generator)
    packed = [kernels.pack_linear([stored]) for _ in range(max(1, -(-COLD_BYTES // stored.nbytes)))]
    figures = []
    for count in rows:
        x = torch.randn(count, inputs, generator=generator).to(kernels.dtype)

        def call(i: int, x: torch.Tensor = x) -> object:
            return kernels.linear(x, packed[i % len(packed)])

        seconds = _median_seconds(call, runs)
        figures.append(_figure("linear", form, count, seconds, packed[0].nbytes, 2 * outputs * inputs * count))
    return figures


def bench_experts(
    kernels: Kernels, hidden: int, inner: int, experts: int, top_k: int, form: str, rows: list[int], runs: int = 15
) -> list[KernelFigure]:
    """One MoE layer's routed experts, rows routed at random, the layers taken in turn so that weights are cold."""
    generator = torch.Generator().manual_seed(0)
    gate, down = random_weight(inner, hidden, form, generator), random_weight(hidden, inner, form, generator)
    each = 2 * gate.nbytes + down.nbytes
    layers = max(1, -(-COLD_BYTES // (each * experts)))
    bank = kernels.expert_bank(layers * experts, hidden, inner)
    for slot in range(layers * experts):
        bank.load(slot, gate, gate, down)
    figures = []
    for count in rows:
        x = torch.randn(count, hidden, generator=generator).to(kernels.dtype)
        chosen = torch.rand(count, experts, generator=generator).topk(top_k).indices
        order = chosen.flatten().argsort(stable=True)
        active, sizes = chosen.flatten()[order].unique_consecutive(return_counts=True)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
        pairs = (order // top_k).int()

        def call(
            i: int,
            x: torch.Tensor = x,
            pairs: torch.Tensor = pairs,
            active: torch.Tensor = active,
            offsets: torch.Tensor = offsets,
        ) -> object:
            return kernels.experts(x, bank, pairs, (active + i % layers * experts).int(), offsets)

        seconds = _median_seconds(call, runs)
        figures.append(
            _figure(
                "experts",
                form,
                count,
                seconds,
                bank.nbytes // (layers * experts) * len(active),
                6 * hidden * inner * count * top_k,
            )
        )
    return figures


def _figure(name: str, form: str, rows: int, seconds: float, nbytes: int, flop: int) -> KernelFigure:
    return KernelFigure(name, form, rows, seconds * 1e6, nbytes / seconds / 1e9, flop / seconds / 1e9)
