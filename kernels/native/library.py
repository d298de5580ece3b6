"""The native library (`kernels/native/csrc/bind.cpp`) and the types of its functions."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from zlib import crc32

from isotherm.kernels.errors import KernelsUnavailable

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "interface": (_I, []),
    "context_create": (_P, [_I, _I, _I]),
    "context_destroy": (None, [_P]),
    "context_isa": (ctypes.c_char_p, [_P]),
    "linear_create": (_P, [_I, _L, _I, _P, _P, _P]),
    "linear_room": (_P, [_I, _L, _I, _P, _P, _L]),
    "linear_adopt": (_I, [_P]),
    "linear_form": (None, [_P, _P]),
    "linear_destroy": (None, [_P]),
    "linear_bytes": (_L, [_P]),
    "linear_pack": (_I, [_P, _P, _I, _P]),
    "linear_finish": (_I, [_P, _P]),
    "linear": (_I, [_P, _P, _P, _L, _L, _P, _I]),
    "head_linear": (_I, [_P, _P, _P, _L, _L, _L, _P]),
    "mlp": (_I, [_P, _P, _P, _P, _L, _L, _P]),
    "bank_create": (_P, [_L, _L, _L]),
    "bank_destroy": (None, [_P]),
    "bank_set": (None, [_P, _L, _P, _P]),
    "experts": (_I, [_P, _P, _P, _L, _L, _P, _L, _P, _P, _L, _P]),
    "mla_prefill": (_I, [_P, _P, _L, _L, _P, _L, _L, _I, _P, _L, _L, _L, _L, _L, _L, _P, _F, _P]),
    "mla_decode": (_I, [_P, _P, _L, _L, _P, _L, _L, _P, _L, _L, _I, _L, _L, _P, _L, _L, _P, _P, _L, _L, _F, _P]),
    "route": (_I, [_P, _P, _P, _L, _L, _P, _P]),
    "rms_norm": (_I, [_P, _P, _L, _L, _L, _P, _F, _P, _P]),
    "rope": (_I, [_P, _P, _L, _L, _L, _L, _L, _P, _P, _P]),
    "combine": (_I, [_P, _P, _L, _L, _L, _L, _P, _P, _P, _P, _P]),
    "combine_outputs": (_I, [_P, _P, _L, _L, _L, _P, _P, _P, _P]),
    "moe": (_I, [_P, _P, _P, _P, _L, _P]),
    "attention": (_I, [_P, _P, _P, _P, _P, _L, _L, _I, _P]),
    "write_cache": (_I, [_P, _P, _L, _L, _P, _L, _L, _P, _L, _I, _P, _L]),
    "forbid": (_I, [_P, _P, _L, _L, _P, _L, _P, _L]),
    "sample": (_I, [_P, _P, _L, _L, _L, _P, _P, _P, _P, _P, _P]),
}  # fmt: skip


_LETTERS: dict[type | None, str] = {None: "-", _P: "P", _L: "L", _I: "I", _F: "F", ctypes.c_char_p: "S"}


def interface() -> int:
    """The number of the signatures above, which the library has to give too: one that was built from other sources
    would take arguments for what they are not."""
    said = (
        (name, _LETTERS[result], *(_LETTERS[a] for a in arguments)) for name, (result, arguments) in _SIGNATURES.items()
    )
    return crc32(repr(sorted(said)).encode()) >> 1


class NativeKernelsUnavailable(KernelsUnavailable):
    """The native library isn't there or can't run here; the message says why and what to do."""


def built_library() -> Path | None:
    """The library that was built into this package, whether or not it can be loaded."""
    built = [p for suffix in EXTENSION_SUFFIXES if (p := Path(__file__).with_name(f"_native{suffix}")).exists()]
    return built[0] if built else None


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """The native library with its signatures set: the one built into this package, or the one at `path`."""
    if path is None:
        path = built_library()
        if path is None:
            raise NativeKernelsUnavailable(
                "the native CPU kernels were not built when isotherm was installed (no C++ compiler?); "
                "install g++ and reinstall isotherm"
            )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"iso_{name}")
            function.restype, function.argtypes = result, arguments
        if (built := library.iso_interface()) != interface():
            raise AttributeError(f"built from other sources (interface {built}, not {interface()})")
    except (OSError, AttributeError) as error:
        raise NativeKernelsUnavailable(
            f"the native CPU kernels at {path} don't load: {error}; reinstall isotherm to rebuild them"
        ) from error
    return library
