"""Starts kernels. The host code goes through here so that a test can record what it would launch and compile that for a
GPU which isn't there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# kernel, grid, arguments by name, warps per program, pipeline stages
Launcher = Callable[[Any, tuple[int, ...], dict[str, Any], int, int], None]


# No multiply and add may be fused but where a kernel says so (tl.fma): a compiler that fuses in one variant of a kernel
# and not in another, say because a mask stands between the two, would give the same row other bits in other company.
OPTIONS = {"enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int) -> None:
    """Run `kernel` on the current CUDA stream, or in the interpreter on CPU tensors."""
    kernel[grid](**arguments, num_warps=warps, num_stages=stages, **OPTIONS)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
