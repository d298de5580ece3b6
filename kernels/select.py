"""Chooses the kernel backend once, when a worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isotherm.kernels.errors import KernelsUnavailable, UnknownKernels
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import ReferenceKernels

NAMES = ("auto", "native", "reference", "triton")
# Instruction sets of the native kernels, as users name them → as the library does.
ISAS = {"auto": None, "amx": "amx_bf16", "avx512": "avx512_bf16", "avx2": "avx2", "generic": "generic"}


def not_one_of(what: str, name: str, known: Sequence[str]) -> str:
    """In words: dtype is "int8"; it must be "float32" or "bfloat16"."""
    *others, last = (f'"{one}"' for one in known)
    return f'{what} is "{name}"; it must be {", ".join(others)} or {last}'


@dataclass(frozen=True)
class Selection:
    kernels: Kernels
    reason: str  # why this backend, for the log and for `isotherm status`


def select_kernels(
    name: str, dtype: torch.dtype, threads: int | None = None, device: str = "cpu", isa: str = "auto"
) -> Selection:
    """`name`: one of NAMES; `device`: cpu or cuda, where auto is triton; `isa`: one of ISAS, for native kernels on a
    CPU. Sets torch's thread count. Raises KernelsUnavailable where what is asked for is not known, cannot load, or is
    not for this device."""
    if name not in NAMES:
        raise UnknownKernels(not_one_of("kernels", name, NAMES))
    if isa not in ISAS:
        raise UnknownKernels(not_one_of("isa", isa, tuple(ISAS)))
    if isa != "auto" and name in ("reference", "triton"):
        raise KernelsUnavailable(f'isa "{isa}" is for native kernels, not for kernels "{name}"; use kernels "native"')
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and name in ("native", "reference"):
        raise KernelsUnavailable(
            f'kernels "{name}" compute on the CPU; a worker with device: cuda needs "triton", which "auto" takes there'
        )
    if device == "cuda" or name == "triton":
        return _triton(dtype, device)
    if name == "reference":
        return Selection(ReferenceKernels(dtype), "plain torch, as asked for")
    from isotherm.kernels.native.backend import NativeKernels
    from isotherm.kernels.native.library import NativeKernelsUnavailable

    try:
        native = NativeKernels(dtype, threads=threads, isa=ISAS[isa])
    except NativeKernelsUnavailable as error:
        if name == "native" or isa != "auto":
            raise
        return Selection(ReferenceKernels(dtype), f"plain torch, since native kernels are not there: {error}")
    # Little is left to torch, and the threads that wait for more of it would spin beside the kernels'
    torch.set_num_threads(1)
    return Selection(native, native.describe())


def _triton(dtype: torch.dtype, device: str) -> Selection:
    try:
        from isotherm.kernels.triton.backend import TritonKernels
    except ImportError as error:
        raise KernelsUnavailable(
            f"the Triton kernels need Triton ({error}); install it with: pip install 'isotherm[gpu]'"
        ) from None
    kernels = TritonKernels(dtype, device)
    return Selection(kernels, kernels.describe())


def cuda_unavailable_reason() -> str | None:
    """Why no worker on this machine can compute on a GPU; None where one can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it"
    return "torch sees no CUDA device: check the driver, and CUDA_VISIBLE_DEVICES"
