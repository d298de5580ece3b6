"""What every operation in Triton needs: the device, how outputs are allocated, how kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from isotherm.kernels.checked import CheckedKernels
from isotherm.kernels.errors import KernelsUnavailable
from isotherm.kernels.triton import interpreter
from isotherm.kernels.triton.launch import Launcher, launch
from isotherm.kernels.triton.weights import Uploader


class TritonKernelsUnavailable(KernelsUnavailable):
    """There is no GPU for the Triton kernels, and no interpreter to stand in for it."""


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreted" if device.type == "cpu" else device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


class TritonBase(CheckedKernels):
    """See TritonKernels."""

    name = "triton"
    summation = 2  # 2: integers by group

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cuda", launcher: Launcher = launch):
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"Triton kernels compute in bfloat16 or float32, not {dtype}")
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TritonKernelsUnavailable(
                "torch sees no CUDA device: check the driver, and that torch is a CUDA build"
            )
        if self.device.type == "cpu":
            if not triton.knobs.runtime.interpret:
                raise TritonKernelsUnavailable(
                    "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before starting Python"
                )
            interpreter.install()
        self.instructions = f"{_architecture(self.device)}, Triton {triton.__version__}"
        self._launch = launcher
        self._upload = Uploader(self.device)
        self.prefill_segment = 4096  # positions whose keys and values are expanded at once; a multiple of PREFILL_KEYS
        self.decode_workspace = 1 << 28  # bytes of partial outputs of mla_decode at once

    def describe(self) -> str:
        """One line for logs and `isotherm status`."""
        where = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"interpreted on {self.device.type}"
        )
        return f"Triton {triton.__version__} kernels, {where}, {str(self.dtype).removeprefix('torch.')}"

    def _run(self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int, **arguments: Any) -> None:
        if 0 not in grid:
            self._launch(kernel, grid, arguments, warps, stages)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
