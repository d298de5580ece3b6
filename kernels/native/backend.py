"""The operations on a CPU in C++ (`kernels/native/`), reached through ctypes: AMX, AVX512-BF16, AVX2 or plain C++,
chosen at run time.

A row's result is the same bits in any batch, with any number of threads and any chunking; between instruction sets it
may differ in the last place. Knows nothing about models, requests or links.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from isotherm.kernels.cache_rows import is_fp8
from isotherm.kernels.checked import CheckedKernels
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.native.attention import plain
from isotherm.kernels.native.bound import BoundLayers, DecoderRows, check_parts
from isotherm.kernels.native.context import Error, NativeContext, fail
from isotherm.kernels.native.draft import BoundDrafts, DraftCall
from isotherm.kernels.native.packed import Packed
from isotherm.kernels.native.router import router_fields
from isotherm.kernels.native.weights import NativeExpertBank, pack
from isotherm.kernels.ops import (
    AttentionRows,
    AttentionWeights,
    DecoderLayer,
    DraftLayer,
    DraftStream,
    LinearWeight,
    Router,
)

OUT_OF_CACHE = "slots, lengths, sequences, chunks or block ids are out of range for a cache of {} blocks"


class NativeKernels(CheckedKernels):
    """CPU kernels in C++; safe to call from several Python threads.

    `threads`: threads of this instance's pool, the caller included (default: usable_cpus). `isa`: one of ISAS (default:
    the best that the machine has). `library`: a library other than the installed one, for tests.
    """

    name = "native"
    summation = 3  # 2: AVX2 multiplies integer weights by integers; 3: of 16 bits

    def __init__(
        self, dtype: torch.dtype, threads: int | None = None, isa: str | None = None, library: Path | None = None
    ):
        self.context = NativeContext(dtype, threads, isa, library)
        self.dtype, self._lib, self._context = dtype, self.context.lib, self.context.handle
        self.threads, self.isa = self.context.threads, self.context.isa
        self.instructions = self.isa
        self.bound = BoundLayers(dtype)
        self._drafts = BoundDrafts(dtype)

    def describe(self) -> str:
        """One line for logs and `isotherm status`."""
        return f"native C++ kernels, {self.isa}, {self.threads} threads, {str(self.dtype).removeprefix('torch.')}"

    # --- weights ----------------------------------------------------------------------------------

    def pack_linear(self, weights: list[StoredWeight], bias: Tensor | None = None) -> LinearWeight:
        packed = pack(self.context, weights, bias)
        return LinearWeight(
            sum(packed.part_outputs), packed.inputs, packed, None if bias is None else bias.float(), packed.nbytes
        )

    def pack_heads(self, weights: list[StoredWeight]) -> Packed:
        if len({w.shape for w in weights}) > 1:
            raise ValueError(f"head weights have shapes {sorted({w.shape for w in weights})}; one shape is needed")
        return pack(self.context, weights)

    def expert_bank(self, slots: int, hidden: int, inner: int) -> NativeExpertBank:
        return NativeExpertBank(self.context, slots, hidden, inner)

    # --- dense operations -------------------------------------------------------------------------

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = self._rows(x_TD, "rms_norm x")
        return self._norm(x, weight_D, eps, None)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = self._rows(x_TD, "add_rms_norm x")
        return self._norm(x, weight_D, eps, self._residual(residual_TD, x).data_ptr())

    def _norm(self, x: Tensor, weight: Tensor, eps: float, residual: int | None) -> Tensor:
        rows, width = x.shape
        if weight.shape != (width,):
            raise ValueError(f"rms_norm weight has shape {tuple(weight.shape)}; x needs ({width},)")
        weight = plain(weight, self.dtype)
        out = torch.empty(rows, width, dtype=self.dtype)
        self._lib.iso_rms_norm(
            self._context, x.data_ptr(), x.stride(0), rows, width, weight.data_ptr(), eps, residual, out.data_ptr()
        )
        return out

    def linear(self, x_TK: Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        x = self._rows(x_TK, "linear x", weight.in_features)
        dtype = out_dtype or self.dtype
        if dtype != self.dtype and dtype != torch.float32:
            raise ValueError(f"linear gives {self.dtype} or torch.float32, not {dtype}")
        rows = x.shape[0]
        out = torch.empty(rows, weight.out_features, dtype=dtype)
        code = self._lib.iso_linear(
            self._context, weight.data.handle, x.data_ptr(), x.stride(0), rows, out.data_ptr(), dtype == torch.float32
        )  # fmt: skip
        if code:
            fail("linear", code, "")
        return out

    def head_linear(self, x_THK: Tensor, weight: Packed) -> Tensor:
        heads = len(weight.part_outputs)
        x = self._heads(x_THK, "head_linear x", heads, weight.inputs)
        out = torch.empty(x.shape[0], heads, weight.part_outputs[0], dtype=self.dtype)
        code = self._lib.iso_head_linear(
            self._context, weight.handle, x.data_ptr(), x.stride(0), x.stride(1), x.shape[0], out.data_ptr()
        )
        if code:
            fail("head_linear", code, "")
        return out

    def mlp(self, x_TD: Tensor, gate_up: LinearWeight, down: LinearWeight) -> Tensor:
        check_parts(gate_up, down)
        x = self._rows(x_TD, "mlp x", gate_up.in_features)
        out = torch.empty(x.shape[0], down.out_features, dtype=self.dtype)
        code = self._lib.iso_mlp(
            self._context, gate_up.data.handle, down.data.handle, x.data_ptr(), x.stride(0), x.shape[0], out.data_ptr()
        )  # fmt: skip
        if code:
            fail("mlp", code, "")
        return out

    def rope(self, x_THR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
        x = self._heads(x_THR, "rope x")
        rows, heads, width = x.shape
        cos, sin = plain(cos_TR2, torch.float32), plain(sin_TR2, torch.float32)
        if width % 2 or cos.shape != (rows, width // 2) or sin.shape != cos.shape:
            raise ValueError(
                f"rope x {tuple(x.shape)} needs cos and sin of shape ({rows}, {width // 2}), not {tuple(cos.shape)}, "
                f"{tuple(sin.shape)}"
            )
        out = torch.empty(rows, heads, width, dtype=self.dtype)
        self._lib.iso_rope(
            self._context, x.data_ptr(), x.stride(0), x.stride(1), rows, heads, width, cos.data_ptr(), sin.data_ptr(),
            out.data_ptr(),
        )  # fmt: skip
        return out

    # --- experts ----------------------------------------------------------------------------------

    def route(self, x_TD: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        fields, _tensors = router_fields(router)
        x = self._rows(x_TD, "route x", fields.hidden)
        rows = x.shape[0]
        ids = torch.empty(rows, router.top_k, dtype=torch.int32)
        weights = torch.empty(rows, router.top_k, dtype=torch.float32)
        code = self._lib.iso_route(
            self._context, ctypes.byref(fields), x.data_ptr(), x.stride(0), rows, ids.data_ptr(), weights.data_ptr()
        )
        if code:
            fail("route", code, "")
        return ids, weights

    def experts(self, x_TD: Tensor, bank: ExpertBank, rows_P: Tensor, slots_A: Tensor, offsets_A1: Tensor) -> Tensor:
        if not isinstance(bank, NativeExpertBank):
            raise TypeError(f"native experts need a bank made by these kernels, not a {type(bank).__name__}")
        x = self._rows(x_TD, "experts x", bank.hidden)
        rows, slots, offsets = (plain(t, torch.int32) for t in (rows_P, slots_A, offsets_A1))
        if len(offsets) != len(slots) + 1:
            raise ValueError(f"{len(slots)} slots need {len(slots) + 1} offsets, not {len(offsets)}")
        pairs = len(rows)
        out = torch.empty(pairs, bank.hidden, dtype=self.dtype)
        code = self._lib.iso_experts(
            self._context, bank.handle, x.data_ptr(), x.stride(0), x.shape[0], rows.data_ptr(), pairs, slots.data_ptr(),
            offsets.data_ptr(), len(slots), out.data_ptr(),
        )  # fmt: skip
        if code == Error.EMPTY_SLOT:
            raise KeyError(f"expert slots {bank.empty(slots.tolist())} are empty")
        if code:
            fail(
                "experts",
                code,
                f"rows must lie in 0 … {x.shape[0] - 1}, slots in the bank, and offsets rise from 0 to {pairs}",
            )
        return out

    def combine(
        self,
        y_PD: Tensor,
        index_Tk: Tensor,
        weights_Tk: Tensor,
        own_TD: Tensor | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        y = self._rows(y_PD, "combine y").contiguous()
        index, weights = plain(index_Tk, torch.int64), plain(weights_Tk, torch.float32)
        if index.dim() != 2 or index.shape != weights.shape or index.shape[1] < 1:
            raise ValueError(
                f"combine's index {tuple(index.shape)} and weights {tuple(weights.shape)} must be one [T, k]"
            )
        (rows, k), (pairs, width) = index.shape, y.shape
        terms = [
            None if t is None else self._rows(t, "combine term", width).contiguous() for t in (own_TD, residual_TD)
        ]
        if any(t is not None and len(t) != rows for t in terms):
            raise ValueError(f"combine adds terms of {[None if t is None else len(t) for t in terms]} rows to {rows}")
        out = torch.empty(rows, width, dtype=self.dtype)
        code = self._lib.iso_combine(
            self._context, y.data_ptr(), pairs, rows, width, k, index.data_ptr(), weights.data_ptr(),
            *(None if t is None else t.data_ptr() for t in terms), out.data_ptr(),
        )  # fmt: skip
        if code:
            fail("combine", code, f"indices must lie in 0 … {pairs - 1}")
        return out

    def moe(self, x_TD: Tensor, router: Router, bank: ExpertBank, slot_of_E: Tensor, gate_up: LinearWeight | None,
            down: LinearWeight | None, residual_TD: Tensor) -> Tensor:  # fmt: skip
        """`Kernels.moe` in one call."""
        bound = self.bound.moe(router, bank, slot_of_E, gate_up, down)
        rows, shape = len(x_TD), x_TD.shape
        x, residual = (
            t if t.is_contiguous() else t.contiguous()
            for t in (self._rows(x_TD, "moe x", bound.hidden), self._rows(residual_TD, "moe residual", bound.hidden))
        )
        if residual.shape != shape:
            raise ValueError(f"moe has {rows} rows and a residual of {len(residual)}")
        out = torch.empty(shape, dtype=self.dtype)
        code = self._lib.iso_moe(
            self._context, ctypes.byref(bound.structure), x.data_ptr(), residual.data_ptr(), rows, out.data_ptr()
        )
        if code:
            fail("moe", code, "")
        return out

    # --- attention --------------------------------------------------------------------------------

    def write_cache(self, latent_TC: Tensor, k_rope_TR: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        latent, rope = self._rows(latent_TC, "write_cache latent"), self._rows(k_rope_TR, "write_cache key")
        slots = plain(slots_T, torch.int64)
        blocks, block_size = self._cache(cache, latent.shape[1], rope.shape[1])
        if not len(latent) == len(rope) == len(slots):
            raise ValueError(f"write_cache has {len(latent)} latents, {len(rope)} keys and {len(slots)} slots")
        code = self._lib.iso_write_cache(
            self._context, latent.data_ptr(), latent.stride(0), latent.shape[1], rope.data_ptr(), rope.stride(0),
            rope.shape[1], cache.data_ptr(), blocks * block_size, is_fp8(cache), slots.data_ptr(), len(slots),
        )  # fmt: skip
        if code:
            fail("write_cache", code, f"slots must lie in 0 … {blocks * block_size - 1}")

    def mla_prefill(self, q_THQ: Tensor, cache: Tensor, block_table_M: Tensor, start: int, kv_b: LinearWeight,
                    v_head_dim: int, scale: float) -> Tensor:  # fmt: skip
        q = self._heads(q_THQ, "mla_prefill q")
        rows, heads, qk_dim = q.shape
        if len(kv_b.data.part_outputs) != 1 or kv_b.out_features % heads:
            raise ValueError(
                f"kv_b packs {kv_b.data.part_outputs} outputs; one part that {heads} heads divide is needed"
            )
        nope = kv_b.out_features // heads - v_head_dim
        rotary = qk_dim - nope
        if nope < 0 or rotary < 0:
            raise ValueError(
                f"kv_b gives {kv_b.out_features // heads} per head, q has {qk_dim}: "
                f"they don't fit v_head_dim {v_head_dim}"
            )
        blocks, block_size = self._cache(cache, kv_b.in_features, rotary)
        table = plain(block_table_M, torch.int32)
        if start < 0 or start + rows > len(table) * block_size:
            raise ValueError(
                f"positions {start} … {start + rows - 1} don't fit a table of {len(table)} blocks of {block_size}"
            )
        out = torch.empty(rows, heads * v_head_dim, dtype=self.dtype)
        code = self._lib.iso_mla_prefill(
            self._context, q.data_ptr(), q.stride(0), q.stride(1), cache.data_ptr(), blocks, block_size, is_fp8(cache),
            table.data_ptr(), start, rows, heads, nope, rotary, v_head_dim, kv_b.data.handle, scale, out.data_ptr(),
        )  # fmt: skip
        if code:
            fail("mla_prefill", code, f"block ids must lie in 0 … {blocks - 1}")
        return out

    def mla_decode(self, q_latent_THC: Tensor, q_rope_THR: Tensor, cache: Tensor, block_tables_SM: Tensor,
                   sequence_T: Tensor, lengths_T: Tensor, scale: float) -> Tensor:  # fmt: skip
        q_latent = self._heads(q_latent_THC, "mla_decode q_latent")
        rows, heads, latent = q_latent.shape
        q_rope = self._heads(q_rope_THR, "mla_decode q_rope", heads)
        rotary = q_rope.shape[2]
        blocks, block_size = self._cache(cache, latent, rotary)
        tables, sequence, lengths = (plain(t, torch.int32) for t in (block_tables_SM, sequence_T, lengths_T))
        if tables.dim() != 2 or not rows == len(q_rope) == len(sequence) == len(lengths):
            raise ValueError(
                f"mla_decode has {rows} rows, but {len(q_rope)} rotary rows, {len(sequence)} sequences and "
                f"{len(lengths)} lengths"
            )
        out = torch.empty(rows, heads, latent, dtype=self.dtype)
        code = self._lib.iso_mla_decode(
            self._context, q_latent.data_ptr(), q_latent.stride(0), q_latent.stride(1), q_rope.data_ptr(),
            q_rope.stride(0), q_rope.stride(1), cache.data_ptr(), blocks, block_size, is_fp8(cache), latent, rotary,
            tables.data_ptr(), tables.shape[0], tables.shape[1], sequence.data_ptr(), lengths.data_ptr(), rows, heads,
            scale, out.data_ptr(),
        )  # fmt: skip
        if code:
            fail(
                "mla_decode",
                code,
                (
                    f"lengths, sequences or block ids are out of range for tables {tuple(tables.shape)} and {blocks} "
                    "blocks"
                ),
            )
        return out

    def attention(self, x_TD: Tensor, a: AttentionWeights, rows: AttentionRows, cache: Tensor) -> Tensor:
        """`Kernels.attention` in one call."""
        weights = self.bound.attention(a)
        bound = self.bound.rows(rows, x_TD, weights.hidden, weights.rotary)
        blocks, block_size = self._cache(cache, weights.latent, weights.rotary)
        out = torch.empty_like(x_TD)
        code = self._lib.iso_attention(
            self._context, ctypes.byref(weights.structure), ctypes.byref(bound.structure), x_TD.data_ptr(),
            cache.data_ptr(), blocks, block_size, is_fp8(cache), out.data_ptr(),
        )  # fmt: skip
        if code:
            fail("attention", code, OUT_OF_CACHE.format(blocks))
        return out

    def decoder(
        self, x_TD: Tensor, layers: Sequence[DecoderLayer], rows: AttentionRows, caches: Sequence[Tensor]
    ) -> Tensor:
        """`Kernels.decoder` in one call."""
        if not layers:
            return x_TD
        bound = self.bound.decoder(layers, caches)
        where = self.bound.rows(rows, x_TD, bound.hidden, bound.rotary)
        h, other = torch.empty_like(x_TD), torch.empty_like(x_TD)
        to = DecoderRows(x_TD.data_ptr(), h.data_ptr(), other.data_ptr(), bound.blocks, bound.block_size, bound.fp8)
        code = self._lib.iso_decoder(
            self._context, bound.array, len(layers), ctypes.byref(where.structure), ctypes.byref(to)
        )
        if code:
            fail("decoder", code, OUT_OF_CACHE.format(bound.blocks))
        return other if len(layers) % 2 else x_TD

    def draft(self, layer: DraftLayer, cache: Tensor, streams: Sequence[DraftStream]) -> list[list[int]]:
        decoder = self.bound.decoder([layer.layer], [cache])
        call = DraftCall(streams, decoder, self.dtype)
        bound, asked = self._drafts.layer(layer).structure, call.structure
        code = self._lib.iso_draft(self._context, ctypes.byref(bound), decoder.array, ctypes.byref(asked))
        if code:
            fail("draft", code, "tokens or positions are out of range; " + OUT_OF_CACHE.format(decoder.blocks))
        return call.guesses()

    # --- sampling ---------------------------------------------------------------------------------

    def forbid(self, logits_NV: Tensor, rows: Sequence[int], allowed_RW: Tensor) -> None:
        (count, width), words = logits_NV.shape, allowed_RW.shape[1]
        at = (ctypes.c_int64 * len(rows))(*rows)
        fits = logits_NV.dtype == torch.float32 and allowed_RW.dtype == torch.int32 and logits_NV.stride(1) == 1
        if not fits or not allowed_RW.is_contiguous() or len(allowed_RW) != len(rows) or words * 32 < width:
            raise ValueError(
                f"forbid needs float32 logits and int32 words of {len(rows)} rows, not {logits_NV.dtype} "
                f"{tuple(logits_NV.shape)} and {allowed_RW.dtype} {tuple(allowed_RW.shape)}"
            )
        if rows and not 0 <= min(rows) <= max(rows) < count:
            raise ValueError(f"forbid has rows {list(rows)} of {count}")
        code = self._lib.iso_forbid(
            self._context, logits_NV.data_ptr(), logits_NV.stride(0), width, at, len(rows), allowed_RW.data_ptr(), words
        )
        if code:
            fail("forbid", code, "")

    def sample(
        self,
        logits_TV: Tensor,
        temperature_T: Tensor,
        top_p_T: Tensor,
        top_k_T: Tensor,
        seed_T: Tensor,
        index_T: Tensor,
    ) -> Tensor:
        logits = logits_TV if logits_TV.stride(-1) == 1 else logits_TV.contiguous()
        if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[1] == 0:
            raise ValueError(f"sample needs float32 logits [T, V], not {logits.dtype} {tuple(logits.shape)}")
        rows, vocab = logits.shape
        temperature, top_p = plain(temperature_T, torch.float64), plain(top_p_T, torch.float64)
        top_k, seed, index = (plain(t, torch.int64) for t in (top_k_T, seed_T, index_T))
        if any(t.shape != (rows,) for t in (temperature, top_p, top_k, seed, index)):
            raise ValueError(f"sample has {rows} rows of logits; every parameter must have shape ({rows},)")
        out = torch.empty(rows, dtype=torch.int64)
        code = self._lib.iso_sample(
            self._context, logits.data_ptr(), logits.stride(0), rows, vocab, temperature.data_ptr(), top_p.data_ptr(),
            top_k.data_ptr(), seed.data_ptr(), index.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        if code:
            fail("sample", code, "")
        return out
