"""What kernels/native/csrc/draft.cpp is told: the layer that guesses, checked once, and what is asked of it."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.kernels.native.attention import plain
from isotherm.kernels.native.bound import BoundDecoder
from isotherm.kernels.ops import DraftLayer, DraftStream

_P, _L, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class _DraftLayer(ctypes.Structure):
    """DraftLayer in api.h."""

    _fields_ = (
        *((name, _P) for name in ("main_norm", "embedding", "enorm", "hnorm", "norm")),
        *((name, _P) for name in ("eh_proj", "head", "cos", "sin")),
        *((name, _L) for name in ("vocabulary", "positions", "rotary")),
        ("eps", _F),
    )


class _DraftStream(ctypes.Structure):
    """DraftStream in api.h."""

    _fields_ = (
        *((name, _L) for name in ("start", "rows", "expanded", "skipped", "blocks")),
        *((name, _L) for name in ("guesses", "top_k", "seed", "index")),
        *((name, _D) for name in ("temperature", "top_p")),
    )


class _HiddenRows(ctypes.Structure):
    """HiddenRows in api.h."""

    _fields_ = (("data", _P), ("rows", _L))


class _DraftCall(ctypes.Structure):
    """DraftCall in api.h."""

    _fields_ = (
        ("streams", _P), ("count", _L), ("tables", _P), ("tokens", _P), ("hidden", _P), ("pieces", _L), ("most", _L),
        ("blocks", _L), ("block_size", _L), ("fp8", _L), ("out", _P),
    )  # fmt: skip


@dataclass(frozen=True)
class BoundDraft:
    """A layer for C++, with what it points to."""

    structure: _DraftLayer
    keep: tuple[Tensor, ...]


def bind_draft(layer: DraftLayer, dtype: torch.dtype) -> BoundDraft:
    """Raises ValueError where its parts do not fit each other."""
    hidden = layer.layer.attention.input.in_features
    names = ("main_norm", "embedding", "enorm", "hnorm", "norm")
    tensors = {name: plain(getattr(layer, name), dtype) for name in names}
    cos, sin = plain(layer.cos, torch.float32), plain(layer.sin, torch.float32)
    vocabulary, rotary = layer.head.out_features, layer.layer.attention.rotary
    shapes = {name: (tuple(t.shape), (hidden,)) for name, t in tensors.items()} | {
        "embedding": (tuple(tensors["embedding"].shape), (vocabulary, hidden)),
        "eh_proj": ((layer.eh_proj.out_features, layer.eh_proj.in_features), (hidden, 2 * hidden)),
        "head": ((vocabulary, layer.head.in_features), (vocabulary, hidden)),
        "cos": (tuple(cos.shape), (len(cos), rotary // 2)),
        "sin": (tuple(sin.shape), (len(cos), rotary // 2)),
    }
    wrong = [f"{name} is {shape}, not {fits}" for name, (shape, fits) in shapes.items() if shape != fits]
    if wrong:
        raise ValueError("draft: " + "; ".join(wrong))
    structure = _DraftLayer(
        eh_proj=layer.eh_proj.data.handle, head=layer.head.data.handle, cos=cos.data_ptr(), sin=sin.data_ptr(),
        vocabulary=vocabulary, positions=len(cos), rotary=rotary, eps=layer.eps,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )  # fmt: skip
    return BoundDraft(structure, (*tensors.values(), cos, sin))


class BoundDrafts:
    """Those that one backend instance has seen. `dtype`: of its activations."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._seen: weakref.WeakKeyDictionary[DraftLayer, BoundDraft] = weakref.WeakKeyDictionary()

    def layer(self, layer: DraftLayer) -> BoundDraft:
        bound = self._seen.get(layer)
        if bound is None:
            bound = self._seen[layer] = bind_draft(layer, self._dtype)
        return bound


class DraftCall:
    """What is asked, as C++ is told it, and room for the guesses. Raises ValueError for rows that are no output of the
    main model."""

    def __init__(self, streams: Sequence[DraftStream], decoder: BoundDecoder, dtype: torch.dtype):
        count = len(streams)
        tables, tokens = array("i"), array("q")
        pieces: list[tuple[int, int]] = []
        asked: list[tuple[float, ...]] = []
        for one in streams:
            table = one.blocks[one.skipped :] if one.skipped else one.blocks
            tables.extend(table)
            tokens.extend(one.tokens)
            asked.append((
                one.start, len(one.tokens), one.expanded, one.skipped, len(table), one.guesses, one.top_k, one.seed,
                one.place, one.temperature, one.top_p,
            ))  # fmt: skip
            for x_TD, row, rows in one.hidden:
                if x_TD.dtype != dtype or x_TD.shape[1:] != (decoder.hidden,) or not x_TD.is_contiguous():
                    raise ValueError(
                        f"draft's rows are {x_TD.dtype} {tuple(x_TD.shape)}; contiguous {dtype} (T, {decoder.hidden}) "
                        "is needed"
                    )
                if row < 0 or rows < 1 or row + rows > len(x_TD):
                    raise ValueError(f"draft has rows {row} … {row + rows - 1} of {len(x_TD)}")
                pieces.append((x_TD.data_ptr() + row * decoder.hidden * dtype.itemsize, rows))
        self._most = max((one.guesses for one in streams), default=0)
        self._out = (_L * (count * self._most))()
        named = (_DraftStream * count)(*asked)  # type: ignore[misc]  # ctypes takes tuples, the sooner
        held = (_HiddenRows * len(pieces))(*pieces)  # type: ignore[misc]
        self._keep = named, tables, tokens, held
        self._streams = streams
        self.structure = _DraftCall(
            ctypes.addressof(named), count, tables.buffer_info()[0], tokens.buffer_info()[0], ctypes.addressof(held),
            len(pieces), self._most, decoder.blocks, decoder.block_size, decoder.fp8, ctypes.addressof(self._out),
        )  # fmt: skip

    def guesses(self) -> list[list[int]]:
        out, most = self._out, self._most
        return [out[i * most : i * most + one.guesses] for i, one in enumerate(self._streams)]
