"""One pool of threads and one instruction set of the native library, which packed weights and kernels share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import torch

from isotherm.kernels.cpus import usable_cpus
from isotherm.kernels.native.library import NativeKernelsUnavailable, load

ISAS = ("amx_bf16", "avx512_bf16", "avx2", "generic")


class Error(IntEnum):
    """What a function gives where it is not 0; `Error` in bind.cpp."""

    OUT_OF_MEMORY = 1
    INDEX_OUT_OF_RANGE = 2
    EMPTY_SLOT = 3
    NOT_FINITE = 4


class NativeContext:
    """Freed with the last of those that hold it. `threads`, `isa`, `library`: see NativeKernels."""

    def __init__(self, dtype: torch.dtype, threads: int | None, isa: str | None, library: Path | None):
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"native kernels compute in bfloat16 or float32, not {dtype}")
        if isa is not None and isa not in ISAS:
            raise ValueError(f"isa {isa!r} is not one of {ISAS}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.dtype = dtype
        self.lib = load(library)
        self.threads = threads or usable_cpus()
        handle = self.lib.iso_context_create(
            self.threads, 0 if isa is None else 1 + ISAS.index(isa), dtype == torch.float32
        )
        if not handle:
            raise NativeKernelsUnavailable(
                f"this machine has no {isa}" if isa else "the native kernels could not start their threads"
            )
        self.handle: int = handle
        free_with(self, self.lib.iso_context_destroy, handle)
        self.isa: str = self.lib.iso_context_isa(handle).decode()

    def spread(self, threads: int) -> None:
        """Have experts whose weights take long to read computed by so many threads, in place of `threads`. Raises
        MemoryError where the system has no more of them."""
        if code := self.lib.iso_context_spread(self.handle, threads):
            fail("spread", code, "")


def free_with(owner: object, free: Callable[[int], None], handle: int) -> None:
    """Free what `handle` names when `owner` goes."""
    # Not at exit: another thread may still be inside a kernel then, and the system takes the memory back anyway.
    weakref.finalize(owner, free, handle).atexit = False


def created(handle: int | None, what: str) -> int:
    if not handle:
        raise MemoryError(f"no memory for {what}")
    return handle


def fail(operation: str, code: int, detail: str) -> NoReturn:
    """Raises what a function's result other than 0 means."""
    if code == Error.OUT_OF_MEMORY:
        raise MemoryError(f"{operation}: out of memory")
    if code == Error.EMPTY_SLOT:
        raise KeyError(f"{operation}: an expert that rows go to is not in the bank")
    raise IndexError(f"{operation}: {detail}")
