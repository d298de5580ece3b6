"""Operations of the Triton kernels at DeepSeek-V3's shapes on this machine's GPU, beside torch's own where it has one:
`python tests/bench/gpu.py`. Microseconds (median), GB/s of weights or cache read, TFLOP/s."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
import triton
from torch import Tensor
from weight_cases import stored

from isotherm.kernels.ops import LinearWeight, Router
from isotherm.kernels.triton.backend import TritonKernels

BF16 = torch.bfloat16
KERNELS = TritonKernels(BF16, "cuda")


def microseconds(work: Callable[..., object], *arguments: object) -> float:
    return 1e3 * triton.testing.do_bench(partial(work, *arguments), warmup=10, rep=60, return_mode="median")


def product(x: Tensor, copies: Iterator[LinearWeight]) -> Tensor:
    return KERNELS.linear(x, next(copies))


def line(name: str, seconds: float, nbytes: float = 0.0, operations: float = 0.0) -> None:
    parts = [f"{name:44} {seconds:10.1f} us"]
    if nbytes:
        parts.append(f"{nbytes / seconds / 1e3:8.0f} GB/s")
    if operations:
        parts.append(f"{operations / seconds / 1e6:8.1f} TFLOP/s")
    print(" ".join(parts), flush=True)


def random_rows(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, device="cuda").to(BF16)


def linear(outputs: int, inputs: int) -> None:
    wide = torch.randn(outputs, inputs, device="cuda").to(BF16)
    for kind in ("bf16", "fp8", "int4"):
        copies = [KERNELS.pack_linear([stored(outputs, inputs, kind, 1)]) for _ in range(4)]  # more than the L2 cache
        for rows in (1, 16, 64, 256, 4096):
            seconds = microseconds(product, random_rows(rows, inputs), cycle(copies))
            line(
                f"linear {outputs}x{inputs} {kind} rows {rows}",
                seconds,
                copies[0].nbytes,
                2.0 * rows * outputs * inputs,
            )
    for rows in (1, 16, 64, 256, 4096):
        x = random_rows(rows, inputs)
        line(
            f"  torch bf16 rows {rows}",
            microseconds(torch.matmul, x, wide.T),
            wide.nbytes,
            2.0 * rows * outputs * inputs,
        )


def experts() -> None:
    hidden, inner, held = 7168, 2048, 32
    for kind in ("fp8", "int4"):
        bank = KERNELS.expert_bank(held, hidden, inner)
        weights = stored(inner, hidden, kind, 1), stored(inner, hidden, kind, 2), stored(hidden, inner, kind, 3)
        for slot in range(held):
            bank.load(slot, *weights)
        for rows in (1, 16, 64, 256, 4096):
            x = random_rows(rows, hidden)
            chosen = torch.stack([torch.randperm(held)[:8] for _ in range(rows)]).flatten()
            order = chosen.argsort(stable=True)
            active, counts = chosen[order].unique_consecutive(return_counts=True)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            pairs = (order // 8).int()
            seconds = microseconds(KERNELS.experts, x, bank, pairs, active.int(), offsets)
            line(f"experts {kind} rows {rows} x 8 of {held}", seconds, bank.nbytes * len(active) / held,
                 6.0 * rows * 8 * hidden * inner)  # fmt: skip


def attention() -> None:
    for heads, streams, length in ((128, 1, 4096), (128, 16, 4096), (128, 64, 4096), (16, 16, 4096)):
        blocks = length // 64
        cache = torch.randn(streams * blocks, 64, 576, device="cuda").to(BF16)
        tables = torch.arange(streams * blocks, dtype=torch.int32, device="cuda").view(streams, blocks)
        q = torch.randn(streams, heads, 576, device="cuda").to(BF16)
        order = torch.arange(streams, dtype=torch.int32, device="cuda")
        lengths = torch.full((streams,), length, dtype=torch.int32, device="cuda")
        seconds = microseconds(KERNELS.mla_decode, q[..., :512], q[..., 512:], cache, tables, order, lengths, 0.07)
        line(f"mla_decode {heads} heads, {streams} x {length}", seconds, cache.nbytes,
             2.0 * heads * streams * length * (576 + 512))  # fmt: skip
    for heads, length in ((16, 512), (16, 4096), (128, 4096)):
        kv_b = KERNELS.pack_linear([stored(heads * 256, 512, "fp8", 3)])
        cache = torch.randn(length // 64, 64, 576, device="cuda").to(BF16)
        table = torch.arange(length // 64, dtype=torch.int32, device="cuda")
        q = torch.randn(length, heads, 192, device="cuda").to(BF16)
        seconds = microseconds(KERNELS.mla_prefill, q, cache, table, 0, kv_b, 128, 0.07)
        line(f"mla_prefill {heads} heads, {length}", seconds, 0, heads * length * length * 320.0)
        k, v = (torch.randn(1, heads, length, w, device="cuda").to(BF16) for w in (192, 128))
        theirs = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        seconds = microseconds(theirs, q.transpose(0, 1)[None], k, v)
        line("  torch's attention alone", seconds, 0, heads * length * length * 320.0)


def small() -> None:
    for rows in (1, 64):
        x = random_rows(rows, 7168)
        router = Router(
            torch.randn(256, 7168, device="cuda") * 0.01, torch.zeros(256, device="cuda"), 8, 4, 8, True, 2.5
        )
        weight = torch.ones(7168, device="cuda")
        line(f"route rows {rows}", microseconds(KERNELS.route, x, router))
        line(f"rms_norm rows {rows}", microseconds(KERNELS.rms_norm, x, weight, 1e-6))
        logits = torch.randn(rows, 129280, device="cuda")
        zeros, ones = torch.zeros(rows).double(), torch.ones(rows).double()
        none, seeds = torch.zeros(rows).long(), torch.arange(rows)
        line(f"sample greedy rows {rows}", microseconds(KERNELS.sample, logits, zeros, ones, none, seeds, none))


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    copy = (
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
    )
    line("copy of 1 GiB (read and written)", microseconds(copy[1].copy_, copy[0]), 2 << 30)
    linear(7168, 2048)
    linear(4096, 7168)
    experts()
    attention()
    small()


if __name__ == "__main__":
    main()
