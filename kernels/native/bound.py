"""Layers and rows as C++ is given them, checked when they are first seen."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from isotherm.kernels.cache_rows import is_fp8
from isotherm.kernels.checked import cache_blocks, check_mlp
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.native.attention import Bound, bind_rows, bind_weights
from isotherm.kernels.native.moe import BoundMoe, bind_moe
from isotherm.kernels.ops import AttentionRows, AttentionWeights, DecoderLayer, LinearWeight, Router

_TILE = 32  # outputs per tile: parts start on a tile of their own
_P, _L = ctypes.c_void_p, ctypes.c_int64


class _DecoderLayer(ctypes.Structure):
    """DecoderLayer in api.h."""

    _fields_ = tuple((name, _P) for name in ("attention", "moe", "gate_up", "down", "cache"))


class DecoderRows(ctypes.Structure):
    """DecoderRows in api.h."""

    _fields_ = (("x", _P), ("h", _P), ("other", _P), ("blocks", _L), ("block_size", _L), ("fp8", _L))


@dataclass(frozen=True)
class BoundDecoder:
    """Layers with their caches, and what the array points to. It keeps no layer alive, for it is kept as long as they
    are."""

    array: ctypes.Array[_DecoderLayer]
    layers: Sequence[weakref.ref[DecoderLayer]]
    caches: Sequence[Tensor]
    attentions: Sequence[Bound]
    moes: Sequence[BoundMoe | None]
    hidden: int
    rotary: int
    blocks: int
    block_size: int
    fp8: bool

    def fits(self, layers: Sequence[DecoderLayer], caches: Sequence[Tensor]) -> bool:
        return (
            len(self.layers) == len(layers)
            and all(ref() is layer for ref, layer in zip(self.layers, layers, strict=True))
            and len(self.caches) == len(caches)
            and all(map(is_, self.caches, caches))
        )


class BoundLayers:
    """What one backend instance has bound. `dtype`: of its activations."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._attention: weakref.WeakKeyDictionary[AttentionWeights, Bound] = weakref.WeakKeyDictionary()
        self._moe: weakref.WeakKeyDictionary[Router, BoundMoe] = weakref.WeakKeyDictionary()
        self._decoders: weakref.WeakKeyDictionary[DecoderLayer, BoundDecoder] = weakref.WeakKeyDictionary()
        self._rows: tuple[AttentionRows, Bound] | None = None  # of the step that was seen last

    def attention(self, a: AttentionWeights) -> Bound:
        bound = self._attention.get(a)
        if bound is None:
            bound = self._attention[a] = bind_weights(a, self._dtype)
        return bound

    def rows(self, rows: AttentionRows, x_TD: Tensor, hidden: int, rotary: int) -> Bound:
        """Those of x. Raises ValueError where they do not fit x, or a layer of such widths."""
        seen = self._rows
        if seen is None or seen[0] is not rows:
            seen = self._rows = rows, bind_rows(rows)
        bound = seen[1]
        if x_TD.dtype != self._dtype or x_TD.shape != (bound.rows, hidden) or not x_TD.is_contiguous():
            raise ValueError(
                f"attention x is {x_TD.dtype} {tuple(x_TD.shape)}; contiguous {self._dtype} ({bound.rows}, {hidden}) "
                "is needed"
            )
        if bound.rotary != rotary:
            raise ValueError(f"attention turns {rotary} values; its cosines and sines are for {bound.rotary}")
        return bound

    def moe(
        self,
        router: Router,
        bank: ExpertBank,
        slot_of_E: Tensor,
        gate_up: LinearWeight | None,
        down: LinearWeight | None,
    ) -> BoundMoe:
        bound = self._moe.get(router)
        if bound is None or not bound.fits(bank, slot_of_E, gate_up, down):
            if gate_up is not None and down is not None:
                check_parts(gate_up, down)
            bound = self._moe[router] = bind_moe(router, bank, slot_of_E, gate_up, down)
        return bound

    def decoder(self, layers: Sequence[DecoderLayer], caches: Sequence[Tensor]) -> BoundDecoder:
        """Raises ValueError, TypeError."""
        bound = self._decoders.get(layers[0])
        if bound is None or not bound.fits(layers, caches):
            bound = self._decoders[layers[0]] = self._decoder(layers, caches)
        return bound

    def _decoder(self, layers: Sequence[DecoderLayer], caches: Sequence[Tensor]) -> BoundDecoder:
        array = (_DecoderLayer * len(layers))()
        attentions: list[Bound] = []
        moes: list[BoundMoe | None] = []
        forms = set()
        for to, layer, cache in zip(array, layers, caches, strict=False):
            weights = self.attention(layer.attention)
            attentions.append(weights)
            blocks, block_size = cache_blocks(cache, weights.latent, weights.rotary, self._dtype)
            forms.add((weights.hidden, weights.rotary, blocks, block_size, is_fp8(cache)))
            to.attention, to.cache = ctypes.addressof(weights.structure), cache.data_ptr()
            moe = None
            if layer.router is not None:
                if layer.bank is None or layer.slot_of_E is None:
                    raise ValueError("a decoder layer with a router needs a bank, and where its experts are in it")
                moe = self.moe(layer.router, layer.bank, layer.slot_of_E, layer.gate_up, layer.down)
                to.moe, width = ctypes.addressof(moe.structure), moe.hidden
            else:
                if layer.gate_up is None or layer.down is None:
                    raise ValueError("a dense decoder layer needs an MLP")
                check_parts(layer.gate_up, layer.down)
                to.gate_up, to.down, width = layer.gate_up.data.handle, layer.down.data.handle, layer.down.out_features
            moes.append(moe)
            if width != weights.hidden:
                raise ValueError(f"a decoder layer's attention gives rows of {weights.hidden}, its MLP of {width}")
        if len(forms) != 1 or len(caches) < len(layers):
            raise ValueError(f"{len(layers)} decoder layers have {len(caches)} caches, and are of such forms: {forms}")
        refs = [weakref.ref(layer) for layer in layers]
        return BoundDecoder(array, refs, tuple(caches), attentions, moes, *forms.pop())


def check_parts(gate_up: LinearWeight, down: LinearWeight) -> None:
    """Raises ValueError where the tiles of gate and up are not those that C++ takes for theirs."""
    inner, parts = down.in_features, gate_up.data.part_outputs
    if parts != (inner, inner) and (parts != (2 * inner,) or inner % _TILE):
        raise ValueError(f"mlp's gate_up packs {parts} outputs; down, with {inner} inputs, needs two parts of {inner}")
    check_mlp(gate_up, down)
    if down.bias is not None and down.data.part_outputs != (down.out_features,):
        raise ValueError("mlp's down must be packed as one part")
