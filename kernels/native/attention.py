"""What kernels/native/csrc/attention.cpp is told: the weights of a layer and the rows of a step as structures of
pointers, checked once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.kernels.ops import AttentionRows, AttentionWeights

_P, _L, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _AttentionWeights(ctypes.Structure):
    """AttentionWeights in api.h."""

    _fields_ = (
        *(
            (name, _P)
            for name in ("input", "q_b", "kv_b", "k_absorb", "v_absorb", "o", "norm", "q_norm", "kv_norm", "post_norm")
        ),
        *((name, _L) for name in ("heads", "nope", "rotary", "latent", "value")),
        *((name, _F) for name in ("eps", "latent_eps", "scale")),
    )


class _PrefillRows(ctypes.Structure):
    """PrefillRows in api.h."""

    _fields_ = (("first", _L), ("count", _L), ("start", _L), ("table", _P), ("table_width", _L))


class _AttentionRows(ctypes.Structure):
    """AttentionRows in api.h."""

    _fields_ = (
        ("rows", _L), ("decodes", _L), ("cos", _P), ("sin", _P), ("slots", _P), ("tables", _P), ("sequences", _L),
        ("table_width", _L), ("sequence", _P), ("lengths", _P), ("prefills", _L), ("prefill", _P),
    )  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """A structure for C++ with what its pointers point to. The numbers say what it fits: a step's rows, the parts of
    a cache's row."""

    structure: ctypes.Structure
    keep: tuple[object, ...]
    rows: int = 0
    hidden: int = 0
    latent: int = 0
    rotary: int = 0


def bind_weights(a: AttentionWeights, dtype: torch.dtype) -> Bound:
    """Check that the weights fit each other, and point to them."""
    query, hidden = a.heads * (a.nope + a.rotary), a.input.in_features
    first = a.input.out_features - a.latent - a.rotary  # outputs of `input` that are queries, or their latent
    low_rank = a.q_b is not None
    shapes = {  # name → (outputs, inputs, as they must be)
        "input": (a.input.out_features, hidden, (first + a.latent + a.rotary, hidden)),
        "kv_b": (a.kv_b.out_features, a.kv_b.in_features, (a.heads * (a.nope + a.value), a.latent)),
        "k_absorb": (sum(a.k_absorb.part_outputs), a.k_absorb.inputs, (a.heads * a.latent, a.nope)),
        "v_absorb": (sum(a.v_absorb.part_outputs), a.v_absorb.inputs, (a.heads * a.value, a.latent)),
        "o": (a.o.out_features, a.o.in_features, (hidden, a.heads * a.value)),
    }
    if a.q_b is not None:
        shapes["q_b"] = (a.q_b.out_features, a.q_b.in_features, (query, first))
    wrong = [f"{name} is {(n, k)}, not {fits}" for name, (n, k, fits) in shapes.items() if (n, k) != fits]
    if not low_rank and first != query:
        wrong.append(f"input gives {first} query outputs, not {query}")
    if (
        len(a.kv_b.data.part_outputs) != 1
        or len(a.k_absorb.part_outputs) != a.heads
        or len(a.v_absorb.part_outputs) != a.heads
    ):
        wrong.append("kv_b must be one part, and the absorbed weights one part per head")
    widths = {"norm": hidden, "post_norm": hidden, "kv_norm": a.latent} | ({"q_norm": first} if low_rank else {})
    norms = {}
    for name, width in widths.items():
        weight = getattr(a, name)
        if weight is None or tuple(weight.shape) != (width,):
            wrong.append(f"{name} must have {width} weights")
        else:
            norms[name] = plain(weight, dtype)
    if a.rotary % 2:
        wrong.append(f"rotary must be even, not {a.rotary}")
    if wrong:
        raise ValueError("attention: " + "; ".join(wrong))
    structure = _AttentionWeights(
        input=a.input.data.handle, q_b=None if a.q_b is None else a.q_b.data.handle, kv_b=a.kv_b.data.handle,
        k_absorb=a.k_absorb.handle, v_absorb=a.v_absorb.handle, o=a.o.data.handle, heads=a.heads, nope=a.nope,
        rotary=a.rotary, latent=a.latent, value=a.value, eps=a.eps, latent_eps=a.latent_eps, scale=a.scale,
        **{name: weight.data_ptr() for name, weight in norms.items()},
    )  # fmt: skip
    return Bound(structure, tuple(norms.values()), hidden=hidden, latent=a.latent, rotary=a.rotary)


def bind_rows(r: AttentionRows) -> Bound:
    count = r.cache_slots.shape[0]  # `len` of a tensor takes ten times as long
    cos, sin = plain(r.cos_TR2, torch.float32), plain(r.sin_TR2, torch.float32)
    slots = plain(r.cache_slots, torch.int64)
    tables, sequence, lengths = (plain(t, torch.int32) for t in (r.decode_tables, r.decode_sequence, r.decode_lengths))
    if (
        cos.shape != sin.shape
        or cos.dim() != 2
        or cos.shape[0] != count
        or not r.decodes == sequence.shape[0] == lengths.shape[0]
        or (r.decodes and tables.dim() != 2)
    ):
        lengths_of = {
            "slots": count, "cosines": tuple(cos.shape), "sines": tuple(sin.shape), "sequences": len(sequence),
            "lengths": len(lengths),
        }  # fmt: skip
        raise ValueError(f"attention has {r.decodes} decode rows, and {lengths_of}")
    if sum(p.count for p in r.prefills) + r.decodes != count:
        raise ValueError(f"{r.decodes} decode rows and chunks of {[p.count for p in r.prefills]} are not {count} rows")
    block_tables = [plain(p.block_table, torch.int32) for p in r.prefills]
    chunks = (_PrefillRows * len(r.prefills))(
        *(
            _PrefillRows(p.first, p.count, p.start, t.data_ptr(), len(t))
            for p, t in zip(r.prefills, block_tables, strict=True)
        )
    )
    structure = _AttentionRows(
        count, r.decodes, cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), tables.data_ptr(), tables.shape[0],
        tables.shape[1] if tables.dim() == 2 else 0, sequence.data_ptr(), lengths.data_ptr(), len(chunks),
        ctypes.addressof(chunks),
    )  # fmt: skip
    keep = (cos, sin, slots, tables, sequence, lengths, block_tables, chunks)
    return Bound(structure, keep, rows=count, rotary=2 * cos.shape[1])


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()
