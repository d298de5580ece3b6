"""A step's chunks as the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from isotherm.cluster.engine.sequence import Chunk, Form
from isotherm.kernels.ops import AttentionRows, PrefillRows


@dataclass(frozen=True)
class StepBatch:
    """T rows: what they are, and where they stand."""

    token_ids: Tensor  # int64 [T]
    attention: AttentionRows
    sample_rows: Tensor  # int64 [samples], rising

    def sampled(self, x_TD: Tensor) -> Tensor:
        """Those of its rows, without a copy where it is all of them."""
        every = self.sample_rows.shape[0] == x_TD.shape[0]
        return x_TD if every else x_TD[self.sample_rows]


class Span(NamedTuple):
    """Rows of one sequence: positions start … start+rows-1. Keys before block `skipped` are not looked at."""

    blocks: list[int]
    start: int
    rows: int
    form: Form
    skipped: int = 0


def build_batch(chunks: Sequence[Chunk], block_size: int, cos: Tensor, sin: Tensor) -> StepBatch:
    """`chunks` as the scheduler gives them: decode form first. cos, sin: float32 [positions, R/2]; everything comes to
    their device."""
    tokens: list[int] = []
    sample_rows: list[int] = []
    for chunk in chunks:
        tokens += chunk.token_ids
        sample_rows += range(len(tokens) - chunk.samples, len(tokens))
    spans = [Span(c.sequence.blocks, c.start, c.count, c.form) for c in chunks]
    return StepBatch(
        token_ids=integers(tokens, np.int64, cos.device),
        attention=attention_rows(spans, block_size, cos, sin),
        sample_rows=integers(sample_rows, np.int64, cos.device),
    )


def integers(values: Sequence[int] | Sequence[Sequence[int]], dtype: type[np.integer], device: torch.device) -> Tensor:
    """Those numbers as a tensor. NumPy reads a list in a third of the time that torch takes, and a step has ten."""
    made = torch.from_numpy(np.array(values, dtype))
    return made if device.type == "cpu" else made.to(device)


def attention_rows(spans: Sequence[Span], block_size: int, cos: Tensor, sin: Tensor) -> AttentionRows:
    """Where rows stand; those in decode form come first."""
    device = cos.device
    positions: list[int] = []
    slots: list[int] = []
    tables: list[list[int]] = []
    lengths: list[int] = []
    sequence_of: list[int] = []
    prefills: list[PrefillRows] = []
    for blocks, start, count, form, skipped in spans:
        end, before = start + count, skipped * block_size
        table = blocks[skipped:] if skipped else blocks
        if form is Form.PREFILL:
            table_M = integers(table, np.int32, device)
            prefills.append(PrefillRows(len(positions), count, start - before, table_M))
        else:
            sequence_of += [len(tables)] * count
            tables.append(table)
            lengths += range(start - before + 1, end - before + 1)
        positions += range(start, end)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(start, end)]
    width = max((len(t) for t in tables), default=0)
    # Positions in a row are had without a copy: after a step's weights have gone through the caches, each of torch's
    # operations takes some 40 µs more.
    where = slice(positions[0], positions[-1] + 1) if len(spans) == 1 else integers(positions, np.int64, device)
    return AttentionRows(
        cos_TR2=cos[where],
        sin_TR2=sin[where],
        cache_slots=integers(slots, np.int64, device),
        decodes=len(sequence_of),
        decode_tables=integers([t + [0] * (width - len(t)) for t in tables], np.int32, device),
        decode_sequence=integers(sequence_of, np.int32, device),
        decode_lengths=integers(lengths, np.int32, device),
        prefills=tuple(prefills),
    )
