"""Attention and its cache in Triton: shapes are checked, outputs allocated and tiles chosen here; the kernels stand in
prefill.py, decode.py and elementwise.py."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from isotherm.kernels.cache_rows import is_fp8
from isotherm.kernels.ops import LinearWeight
from isotherm.kernels.triton.base import TritonBase
from isotherm.kernels.triton.coded_cache import gathered, planes, read_coded_kernel, write_coded_kernel
from isotherm.kernels.triton.decode import merge_kernel, mla_decode_kernel
from isotherm.kernels.triton.elementwise import write_cache_kernel
from isotherm.kernels.triton.launch import cdiv, power_of_two
from isotherm.kernels.triton.prefill import mla_prefill_kernel

# Each of these is part of what a result's bits are: one value for every batch.
KV_SPLIT, DECODE_KEYS = 1024, 64  # mla_decode: positions per split, and per tile
PREFILL_KEYS, PREFILL_ROWS = 64, 128  # mla_prefill: keys and rows per tile


class TritonAttention(TritonBase):
    @abstractmethod
    def _linear(self, x: Tensor, index: Tensor | None, rows: int, weight: LinearWeight, dtype: torch.dtype) -> Tensor:
        """Rows x[index], or all of x, by `weight`. `x` may have more columns than the weight has inputs."""

    def write_cache(self, latent_TC: Tensor, k_rope_TR: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        latent, rope = self._rows(latent_TC, "write_cache latent"), self._rows(k_rope_TR, "write_cache key")
        widths = latent.shape[1], rope.shape[1]
        self._block_size(cache, *widths)
        if not len(latent) == len(rope) == len(slots_T):
            raise ValueError(f"write_cache has {len(latent)} latents, {len(rope)} keys and {len(slots_T)} slots")
        rows = {"latent": latent, "rope": rope, "slots": slots_T.contiguous(), "stride_latent": latent.stride(0),
                "stride_rope": rope.stride(0)}  # fmt: skip
        if is_fp8(cache):
            self._run(write_coded_kernel, (len(latent),), 4, 1, **rows, **self._coded(cache, *widths))
        else:
            self._run(write_cache_kernel, (len(latent),), 4, 1, **rows, cache=cache, C=widths[0], R=widths[1],
                      BLOCK=power_of_two(max(widths)))  # fmt: skip

    def gather(self, cache: Tensor, slots_NK: Tensor, latent: int) -> Tensor:
        if is_fp8(cache):
            return gathered(cache, slots_NK, latent, self.dtype)
        return super().gather(cache, slots_NK, latent)

    def _coded(self, cache: Tensor, latent: int, rotary: int) -> dict[str, Any]:
        """Where a cache in FP8 has what, for its kernels."""
        codes, keys, scales = planes(cache, latent, self.dtype)
        return {"codes": codes, "keys": keys, "scales": scales, "C": latent, "R": rotary, "SIZE": cache.shape[1],
                "STRIDE_CODES": codes.stride(0), "STRIDE_VALUES": keys.stride(0), "CODED": codes.shape[2],
                "BLOCK_C": power_of_two(latent), "BLOCK_R": power_of_two(rotary)}  # fmt: skip

    def mla_prefill(self, q_THQ: Tensor, cache: Tensor, block_table_M: Tensor, start: int, kv_b: LinearWeight,
                    v_head_dim: int, scale: float) -> Tensor:  # fmt: skip
        q = self._heads(q_THQ, "mla_prefill q")
        rows, heads, qk_dim = q.shape
        nope = kv_b.out_features // heads - v_head_dim
        rotary = qk_dim - nope
        if kv_b.out_features % heads or nope < 0 or rotary < 0:
            raise ValueError(
                f"kv_b gives {kv_b.out_features} for {heads} heads, q has {qk_dim}: "
                f"they don't fit v_head_dim {v_head_dim}"
            )
        block_size = self._block_size(cache, kv_b.in_features, rotary)
        length = start + rows
        if start < 0 or length > len(block_table_M) * block_size:
            raise ValueError(
                f"positions {start} … {length - 1} don't fit a table of {len(block_table_M)} blocks of {block_size}"
            )
        out = self._empty(rows, heads * v_head_dim)
        if rows == 0:
            return out
        position = torch.arange(length, device=self.device)
        slots = (block_table_M.to(self.device)[position // block_size] * block_size + position % block_size).to(
            torch.int32
        )
        blocks = {
            "BLOCK_N": power_of_two(max(nope, 16)),
            "BLOCK_R": power_of_two(max(rotary, 16)),
            "BLOCK_V": power_of_two(max(v_head_dim, 16)),
        }
        even = blocks == {"BLOCK_N": nope, "BLOCK_R": rotary, "BLOCK_V": v_head_dim}
        once = length <= self.prefill_segment
        state_acc = None if once else self._empty(rows, heads, v_head_dim, dtype=torch.float32)
        state_ml = None if once else self._empty(2, rows, heads, dtype=torch.float32)
        for segment in range(0, length, self.prefill_segment):
            end = min(segment + self.prefill_segment, length)
            entries, index = self._plain_entries(cache, slots, segment, end, kv_b.in_features, rotary)
            expanded = self._linear(entries, index[segment:end], end - segment, kv_b, self.dtype)
            self._run(
                mla_prefill_kernel, (cdiv(rows, PREFILL_ROWS), heads), 8, 3, q=q, expanded=expanded, cache=entries,
                slots=index, state_acc=state_acc, state_ml=state_ml, out=out, scale=scale, rows=rows, start=start,
                segment=segment, segment_end=end, H=heads, C=kv_b.in_features, R=rotary, NOPE=nope, V=v_head_dim,
                stride_qt=q.stride(0), stride_qh=q.stride(1), stride_kv=expanded.stride(0), FIRST=segment == 0,
                LAST=end == length, EVEN=even, BLOCK_T=PREFILL_ROWS, BLOCK_L=PREFILL_KEYS, **blocks,
            )  # fmt: skip
        return out

    def _plain_entries(
        self, cache: Tensor, slots: Tensor, first: int, last: int, latent: int, rotary: int
    ) -> tuple[Tensor, Tensor]:
        """(entries [*, C + R] in `dtype`, where each position is among them) of positions first … last-1: the cache
        itself, or what one in FP8 holds of them, widened."""
        if not is_fp8(cache):
            return cache.view(-1, cache.shape[-1]), slots
        entries = self._empty(last - first, latent + rotary)
        self._run(read_coded_kernel, (last - first,), 4, 1, slots=slots[first:last], out=entries,
                  **self._coded(cache, latent, rotary))  # fmt: skip
        return entries, torch.arange(-first, last - first, dtype=torch.int32, device=self.device)

    def mla_decode(self, q_latent_THC: Tensor, q_rope_THR: Tensor, cache: Tensor, block_tables_SM: Tensor,
                   sequence_T: Tensor, lengths_T: Tensor, scale: float) -> Tensor:  # fmt: skip
        q = self._heads(q_latent_THC, "mla_decode q_latent")
        rows, heads, latent = q.shape
        q_rope = self._heads(q_rope_THR, "mla_decode q_rope", heads)
        rotary = q_rope.shape[2]
        block_size = self._block_size(cache, latent, rotary)
        if block_tables_SM.dim() != 2 or not rows == len(q_rope) == len(sequence_T) == len(lengths_T):
            raise ValueError(
                f"mla_decode has {rows} rows, but {len(q_rope)} rotary rows, {len(sequence_T)} sequences and "
                f"{len(lengths_T)} lengths"
            )
        tables, sequence, lengths = (
            t.to(self.device, torch.int32).contiguous() for t in (block_tables_SM, sequence_T, lengths_T)
        )
        out = self._empty(rows, heads, latent)
        splits = max(1, cdiv(tables.shape[1] * block_size, KV_SPLIT))
        block_c, block_r = power_of_two(max(latent, 16)), power_of_two(max(rotary, 16))
        even = (block_c, block_r, 0) == (latent, rotary, heads % 64)
        entries: dict[str, Any] = {"cache": cache, "keys": None, "scales": None, "STRIDE_CODES": 0, "STRIDE_VALUES": 0,
                                   "CODED": 0}  # fmt: skip
        if is_fp8(cache):
            coded = self._coded(cache, latent, rotary)
            entries = {"cache": coded["codes"], **{name: coded[name] for name in entries if name != "cache"}}
        # The partial outputs of a long table's rows would fill the memory, so rows are taken some at a time.
        at_once = rows if splits == 1 else max(1, min(rows, self.decode_workspace // (splits * heads * latent * 4)))
        partial = self._empty(at_once, splits, heads, latent, dtype=torch.float32) if splits > 1 else None
        partial_ml = self._empty(at_once, splits, 2, heads, dtype=torch.float32) if splits > 1 else None
        for first in range(0, rows, max(1, at_once)):
            some = slice(first, min(first + at_once, rows))
            count = some.stop - some.start
            self._run(
                mla_decode_kernel, (count * cdiv(heads, 64), splits), 8, 2, q_latent=q[some], q_rope=q_rope[some],
                **entries, tables=tables, sequence=sequence[some], lengths=lengths[some], out=out[some],
                partial=partial, partial_ml=partial_ml, scale=scale, splits=splits, H=heads, C=latent, R=rotary,
                stride_qt=q.stride(0), stride_qh=q.stride(1), stride_rt=q_rope.stride(0), stride_rh=q_rope.stride(1),
                stride_table=tables.stride(0), BLOCK_SIZE=block_size, SPLIT=KV_SPLIT, EVEN=even, BLOCK_H=64,
                BLOCK_L=DECODE_KEYS, BLOCK_C=block_c, BLOCK_R=block_r,
            )  # fmt: skip
            if splits > 1:
                self._run(merge_kernel, (count, heads), 4, 1, lengths=lengths[some], partial=partial,
                          partial_ml=partial_ml, out=out[some], splits=splits, H=heads, C=latent, SPLIT=KV_SPLIT,
                          BLOCK_C=block_c)  # fmt: skip
        return out

    def _block_size(self, cache: Tensor, latent: int, rotary: int) -> int:
        """The cache's block size."""
        _, block_size = self._cache(cache, latent, rotary)
        if cache.numel() >= 2**31:
            raise ValueError(
                f"a layer's cache of {cache.numel()} values is too large: kernels address fewer than 2³¹; "
                "use fewer blocks"
            )
        return block_size
