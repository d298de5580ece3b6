"""A step's chunks as the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.cluster.engine.sequence import Chunk, Form
from isotherm.kernels.ops import AttentionRows, PrefillRows


@dataclass(frozen=True)
class StepBatch:
    """T rows: what they are, and where they stand."""

    token_ids: Tensor  # int64 [T]
    attention: AttentionRows
    sample_rows: Tensor  # int64 [samples]


def build_batch(chunks: Sequence[Chunk], block_size: int, cos: Tensor, sin: Tensor) -> StepBatch:
    """`chunks` as the scheduler gives them: decode form first. cos, sin: float32 [positions, R/2]; everything comes to
    their device."""
    device = cos.device
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tables: list[list[int]] = []
    sequence_of: list[int] = []
    prefills: list[PrefillRows] = []
    sample_rows: list[int] = []
    for chunk in chunks:
        blocks, end = chunk.sequence.blocks, chunk.start + chunk.count
        if chunk.form is Form.PREFILL:
            prefills.append(
                PrefillRows(
                    len(tokens), chunk.count, chunk.start, torch.tensor(blocks, dtype=torch.int32, device=device)
                )
            )
        else:
            sequence_of += [len(tables)] * chunk.count
            tables.append(blocks)
        tokens += chunk.token_ids
        positions += range(chunk.start, end)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, end)]
        sample_rows += range(len(tokens) - chunk.samples, len(tokens))
    decodes = len(sequence_of)
    width = max((len(t) for t in tables), default=0)
    where = torch.tensor(positions, device=device)
    return StepBatch(
        token_ids=torch.tensor(tokens, device=device),
        attention=AttentionRows(
            cos_TR2=cos[where],
            sin_TR2=sin[where],
            cache_slots=torch.tensor(slots, device=device),
            decodes=decodes,
            decode_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, device=device),
            decode_sequence=torch.tensor(sequence_of, dtype=torch.int32, device=device),
            decode_lengths=torch.tensor([p + 1 for p in positions[:decodes]], dtype=torch.int32, device=device),
            prefills=tuple(prefills),
        ),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )
