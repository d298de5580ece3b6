"""The native library (`kernels/native/csrc/bind.cpp`), found and loaded."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from isotherm.kernels.errors import KernelsUnavailable
from isotherm.kernels.native import signatures


class NativeKernelsUnavailable(KernelsUnavailable):
    """The native library isn't there or can't run here; the message says why and what to do."""


def built_library() -> Path | None:
    """The library that was built into this package, whether or not it can be loaded."""
    built = [p for suffix in EXTENSION_SUFFIXES if (p := Path(__file__).with_name(f"_native{suffix}")).exists()]
    return built[0] if built else None


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """The native library with the types of its kernels set: the one built into this package, or the one at `path`."""
    if path is None:
        path = built_library()
        if path is None:
            raise NativeKernelsUnavailable(
                "the native CPU kernels were not built when isotherm was installed (no C++ compiler?); "
                "install g++ and reinstall isotherm"
            )
    try:
        library = ctypes.CDLL(str(path))
        signatures.set_types(library, signatures.KERNELS)
        if (built := library.iso_interface()) != (ours := signatures.interface()):
            raise AttributeError(f"built from other sources (interface {built}, not {ours})")
    except (OSError, AttributeError) as error:
        raise NativeKernelsUnavailable(
            f"the native CPU kernels at {path} don't load: {error}; reinstall isotherm to rebuild them"
        ) from error
    return library
