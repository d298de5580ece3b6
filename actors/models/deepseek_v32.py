"""DeepSeek-V3.2's forward pass: DeepSeek-V3's, but that a row which sees more than `index_topk` positions attends to
those alone that the layer's indexer chooses.

A row within `index_topk` is computed as DeepSeek-V3's is, for there the indexer would choose all. One beyond is
computed in decode form, over its chosen entries side by side, in prompts too: so its bits depend on its position alone.
Each of these rows reads all keys of the indexer, and gathers its entries: prompts beyond `index_topk` are slow here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotherm.actors.models.decoder import Decoder, Layer
from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.indexer import Indexer
from isotherm.actors.models.protocol import RoutedExperts
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.deepseek_v32 import DeepseekV32Config
from isotherm.kernels.ops import AttentionRows, AttentionWeights, Kernels, PrefillRows


@dataclass(frozen=True)
class SparseRows:
    """Rows of one sequence beyond `topk`, and how many positions each sees."""

    rows: Tensor  # int64 [n]
    lengths: Tensor  # int64 [n]
    longest: int
    block_table: Tensor  # int32 [M]


class DeepseekV32Model(DeepseekV3Model):
    config: DeepseekV32Config

    def __init__(
        self, config: DeepseekV32Config, kernels: Kernels, reader: WeightReader, max_positions: int, **options: Any
    ):
        self.indexers: list[Indexer] = []
        super().__init__(config, kernels, reader, max_positions, **options)

    def _load_layer(self, reader: WeightReader, i: int) -> Layer:
        self.indexers.append(Indexer.load(self.config, self.kernels, reader, self.config.layer(i)))
        return super()._load_layer(reader, i)

    def new_cache(self, blocks: int, block_size: int) -> list[Tensor]:
        """Latents of every layer, then keys of every layer's indexer, [blocks, block_size, index_head_dim] in the
        activations' dtype."""
        k, width = self.kernels, self.config.index_head_dim
        keys = [torch.zeros(blocks, block_size, width, dtype=k.dtype, device=k.device) for _ in self.layers]
        return super().new_cache(blocks, block_size) + keys

    def _decoder(self, layers: Sequence[Layer]) -> Decoder:
        return SparseDecoder(layers, self.indexers)


class SparseDecoder(Decoder):
    """Beyond so many positions each layer's attention is of those alone that its indexer chooses. Keys of the indexers
    are in the caches that follow the layers' own."""

    attends_plainly = False

    def __init__(self, layers: Sequence[Layer], indexers: Sequence[Indexer]):
        super().__init__(layers)
        self._indexers = indexers

    def attend(self, kernels: Kernels, i: int, x_TD: Tensor, rows: AttentionRows, caches: Sequence[Tensor]) -> Tensor:
        k, a, indexer, cache = kernels, self.layers[i].attention, self._indexers[i], caches[i]
        keys = caches[len(self.layers) + i]
        h_TD = k.rms_norm(x_TD, a.norm, a.eps)
        indexer.write_keys(h_TD, rows, keys)
        sparse = list(sparse_rows(rows, indexer.topk))
        if not sparse:
            return k.attention(x_TD, a, rows, cache)
        q_nope, q_rope, source_TK = k.project(h_TD, a, rows, cache)
        out_TX = torch.empty(len(x_TD), a.heads * a.value, dtype=k.dtype, device=x_TD.device)
        _dense(k, a, rows, cache, (q_nope, q_rope), indexer.topk, out_TX)
        for some in sparse:
            at, table = some.rows, some.block_table.long()
            keys_LE = keys[table].flatten(0, 1)[: some.longest]
            chosen = indexer.choose(
                h_TD[at], source_TK[at], rows.cos_TR2[at], rows.sin_TR2[at], some.lengths, keys_LE
            )  # fmt: skip
            for part, positions in chosen:
                out_TX[at[part]] = _chosen(k, a, q_nope[at[part]], q_rope[at[part]], cache, table, positions)
        return k.add_rms_norm(k.linear(out_TX, a.o), x_TD, a.post_norm, a.eps)

    def together(self, experts: RoutedExperts) -> None:
        """None: the kernels know of no indexer."""


def sparse_rows(rows: AttentionRows, topk: int) -> Iterator[SparseRows]:
    """The rows that see more than `topk` positions, by sequence."""
    beyond = (rows.decode_lengths > topk).nonzero()[:, 0]
    for sequence in rows.decode_sequence[beyond].unique().tolist():
        mine = beyond[rows.decode_sequence[beyond] == sequence]
        lengths = rows.decode_lengths[mine].long()
        yield SparseRows(mine, lengths, int(lengths.max()), rows.decode_tables[sequence])
    for chunk in rows.prefills:
        begin, end = max(chunk.start, topk), chunk.start + chunk.count
        if begin < end:
            lengths = torch.arange(begin + 1, end + 1, device=rows.cache_slots.device)
            yield SparseRows(lengths - 1 - chunk.start + chunk.first, lengths, end, chunk.block_table)


def _dense(
    k: Kernels,
    a: AttentionWeights,
    rows: AttentionRows,
    cache: Tensor,
    queries: tuple[Tensor, Tensor],
    topk: int,
    out_TX: Tensor,
) -> None:
    """The rows that see at most `topk` positions, as Kernels.attention computes them."""
    q_nope, q_rope = queries
    within = (rows.decode_lengths <= topk).nonzero()[:, 0]
    if len(within):
        latent = k.mla_decode(
            k.head_linear(q_nope[within], a.k_absorb), q_rope[within], cache, rows.decode_tables,
            rows.decode_sequence[within], rows.decode_lengths[within], a.scale,
        )  # fmt: skip
        out_TX[within] = k.head_linear(latent, a.v_absorb).flatten(1)
    for chunk in rows.prefills:
        if (count := min(chunk.count, topk - chunk.start)) > 0:
            some = PrefillRows(chunk.first, count, chunk.start, chunk.block_table)
            mine = slice(some.first, some.first + count)
            q = torch.cat([q_nope[mine], q_rope[mine]], -1)
            out_TX[mine] = k.mla_prefill(q, cache, some.block_table, some.start, a.kv_b, a.value, a.scale)


def _chosen(
    k: Kernels,
    a: AttentionWeights,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    table: Tensor,
    positions: Tensor,
) -> Tensor:
    """Attention of each row to positions of its own, [n, topk]: a cache of a block for each."""
    size, (count, topk) = cache.shape[1], positions.shape
    entries = k.gather(cache, table[positions // size] * size + positions % size, a.latent)
    rows = torch.arange(count, dtype=torch.int32, device=entries.device)
    latent = k.mla_decode(
        k.head_linear(q_nope, a.k_absorb), q_rope, entries, rows[:, None], rows,
        torch.full_like(rows, topk), a.scale,
    )  # fmt: skip
    return k.head_linear(latent, a.v_absorb).flatten(1)
