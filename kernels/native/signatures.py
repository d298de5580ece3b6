"""The types of the native library's functions (`kernels/native/csrc/`), which ctypes does not check."""

from __future__ import annotations

import ctypes
from zlib import crc32

_P, _L, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double

Signatures = dict[str, tuple[type | None, list[type]]]

KERNELS: Signatures = {
    "interface": (_I, []),
    "context_create": (_P, [_I, _I, _I]),
    "context_spread": (_I, [_P, _I]),
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
    "round": (_I, [_P, _I, _P, _L, _L, _P, _P]),
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
    "decoder": (_I, [_P, _P, _L, _P, _P]),
    "draft": (_I, [_P, _P, _P, _P]),
    "write_cache": (_I, [_P, _P, _L, _L, _P, _L, _L, _P, _L, _I, _P, _L]),
    "forbid": (_I, [_P, _P, _L, _L, _P, _L, _P, _L]),
    "sample": (_I, [_P, _P, _L, _L, _L, _P, _P, _P, _P, _P, _P]),
}  # fmt: skip

# Built on Linux alone.
LINKS: Signatures = {
    "segment_begin": (None, [_P, _L]),
    "end_open": (_P, [_P, _P, _P, _I, _I]),
    "end_close": (None, [_P]),
    "end_abandon": (None, [_P]),
    "end_move": (None, [_P, _P, _L, _I]),
    "end_bytes": (_L, [_P]),
    "end_send": (_L, [_P, _L, _L, _P, _L, _P, _P, _L, _P, _L, _L, _L, _I]),
    "end_receive": (_I, [_P, _D, _P]),
    "end_step": (None, [_P, _I]),
    "end_await_request": (_I, [_P, _D]),
    "end_read": (ctypes.c_char_p, [_P, _L, _P]),
    "end_reply": (_I, [_P, _L, _I, _P, _L]),
    "gate_create": (_P, []),
    "gate_destroy": (None, [_P]),
    "gate_enter": (None, [_P]),
    "gate_leave": (None, [_P]),
    "loop_create": (_P, [_P, _P, _P, _P, _P, _L, _L, _L, _L, _I, _D]),
    "loop_stop": (None, [_P]),
    "loop_destroy": (None, [_P]),
    "loop_prod": (None, [_P]),
    "loop_bell": (_I, [_P]),
    "loop_attach": (_L, [_P, _I, _I]),
    "loop_detach": (None, [_P, _L]),
    "loop_event": (_I, [_P, _P, _P, _L]),
    "loop_counts": (None, [_P, _P]),
    "exchange_create": (_P, [_P, _P, _L]),
    "exchange_destroy": (None, [_P]),
    "exchange_layer": (_I, [_P, _P, _P]),
    "exchange_layers": (_I, [_P, _P, _L, _P, _P]),
    "gather_choose": (None, [_P, _L, _L, _L, _L, _L, _P]),
}  # fmt: skip

_LETTERS: dict[type | None, str] = {None: "-", _P: "P", _L: "L", _I: "I", _F: "F", _D: "D", ctypes.c_char_p: "S"}


def interface() -> int:
    """The number of all signatures above, which the library has to give too: one that was built from other sources
    would take arguments for what they are not."""
    said = (
        (name, _LETTERS[result], *(_LETTERS[a] for a in arguments))
        for name, (result, arguments) in (KERNELS | LINKS).items()
    )
    return crc32(repr(sorted(said)).encode()) >> 1


def set_types(library: ctypes.CDLL, signatures: Signatures) -> None:
    """Raises AttributeError, which names the first function that `library` lacks."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"iso_{name}")
        function.restype, function.argtypes = result, arguments
