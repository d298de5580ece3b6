"""Kernels of each instruction set that runs here, and a layer's attention and rows for them: for the
tests of the native kernels."""

from __future__ import annotations

import torch
from weight_cases import BF16, randn, stored

from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.context import ISAS
from isotherm.kernels.native.library import NativeKernelsUnavailable
from isotherm.kernels.ops import AttentionRows, AttentionWeights, Kernels, PrefillRows

_made: dict[tuple[torch.dtype, int, str | None], NativeKernels] = {}


def native(dtype: torch.dtype, threads: int = 2, isa: str | None = None) -> NativeKernels:
    key = (dtype, threads, isa)
    if key not in _made:
        _made[key] = NativeKernels(dtype, threads, isa)
    return _made[key]


def runnable() -> list[str]:
    out = []
    for isa in ISAS:
        try:
            NativeKernels(BF16, 1, isa)
        except NativeKernelsUnavailable:
            continue
        out.append(isa)
    return out


# nope and value as whole blocks, so that FP8 stays FP8
HEADS, NOPE, ROTARY, LATENT, VALUE, WIDTH = 3, 128, 16, 72, 128, 96


def attention_weights(kernels: Kernels, kind: str, low_rank: int | None, biased: bool) -> AttentionWeights:
    queries = HEADS * (NOPE + ROTARY)
    first, kv_b = low_rank or queries, stored(HEADS * (NOPE + VALUE), LATENT, kind, 3, (NOPE, NOPE + VALUE))
    heads = [kv_b.rows(h * (NOPE + VALUE), (h + 1) * (NOPE + VALUE), kernels.dtype) for h in range(HEADS)]
    return AttentionWeights(
        norm=randn(WIDTH, seed=10, dtype=kernels.dtype), post_norm=randn(WIDTH, seed=11, dtype=kernels.dtype), eps=1e-5,
        latent_eps=1e-6,
        input=kernels.pack_linear([stored(first, WIDTH, kind, 1), stored(LATENT + ROTARY, WIDTH, kind, 2)],
                                  randn(first + LATENT + ROTARY, seed=12) if biased else None),
        q_norm=randn(low_rank, seed=13, dtype=kernels.dtype) if low_rank else None,
        q_b=kernels.pack_linear([stored(queries, low_rank, kind, 4)]) if low_rank else None,
        kv_norm=randn(LATENT, seed=14, dtype=kernels.dtype), kv_b=kernels.pack_linear([kv_b]),
        k_absorb=kernels.pack_heads([w.rows(0, NOPE, kernels.dtype).transpose(kernels.dtype) for w in heads]),
        v_absorb=kernels.pack_heads([w.rows(NOPE, NOPE + VALUE, kernels.dtype) for w in heads]),
        o=kernels.pack_linear([stored(WIDTH, HEADS * VALUE, kind, 5)], randn(WIDTH, seed=15) if biased else None),
        heads=HEADS, nope=NOPE, rotary=ROTARY, latent=LATENT, value=VALUE, scale=0.1,
    )  # fmt: skip


def attention_rows(decodes: list[int], chunks: list[tuple[int, int]]) -> tuple[AttentionRows, int]:
    """Decode rows at these positions of a sequence each, and (start, count) chunks; blocks of 4 tokens. Also how many
    blocks there are."""
    lengths = [p + 1 for p in decodes] + [start + count for start, count in chunks]
    blocks = [-(-n // 4) for n in lengths]
    tables = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).to(torch.int32).split(blocks)
    positions = [(s, p) for s, p in enumerate(decodes)]
    prefills = []
    for s, (start, count) in enumerate(chunks, len(decodes)):
        prefills.append(PrefillRows(len(positions), count, start, tables[s]))
        positions += [(s, p) for p in range(start, start + count)]
    width = max(blocks[: len(decodes)], default=0)
    padded = [torch.nn.functional.pad(t, (0, width - len(t))) for t in tables[: len(decodes)]]
    return AttentionRows(
        cos_TR2=randn(len(positions), ROTARY // 2, seed=2), sin_TR2=randn(len(positions), ROTARY // 2, seed=3),
        cache_slots=torch.tensor([int(tables[s][p // 4]) * 4 + p % 4 for s, p in positions], dtype=torch.int64),
        decodes=len(decodes), decode_tables=torch.stack(padded) if padded else torch.zeros(0, dtype=torch.int32),
        decode_sequence=torch.arange(len(decodes), dtype=torch.int32),
        decode_lengths=torch.tensor(lengths[: len(decodes)], dtype=torch.int32), prefills=tuple(prefills),
    ), sum(blocks)  # fmt: skip
