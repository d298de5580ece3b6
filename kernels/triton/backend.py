"""The operations on an NVIDIA GPU in Triton (`kernels/triton/`): shapes are checked, outputs allocated and tiles chosen
here.

The package's docstring says what has been checked, what has never run, and why a row's bits don't depend on its
company. Nothing here reads a tensor's values on a GPU, so no call waits for the device, but for `sample`, which asks
once which rows have top-k or top-p.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotherm.kernels.ops import ExpertBank, Kernels, LinearWeight, Router, StoredWeight
from isotherm.kernels.triton import interpreter
from isotherm.kernels.triton.decode import merge_kernel, mla_decode_kernel
from isotherm.kernels.triton.elementwise import combine_kernel, rms_norm_kernel, rope_kernel, write_cache_kernel
from isotherm.kernels.triton.gemm import choose_tile, finish_kernel, gate_up_kernel, linear_kernel
from isotherm.kernels.triton.grouped import expert_down_kernel, expert_gate_up_kernel
from isotherm.kernels.triton.launch import Launcher, cdiv, launch, power_of_two
from isotherm.kernels.triton.prefill import mla_prefill_kernel
from isotherm.kernels.triton.route import route_scores_kernel, route_select_kernel
from isotherm.kernels.triton.sample import sample_chunk_kernel, sample_filtered_kernel, sample_merge_kernel
from isotherm.kernels.triton.weights import PackedHeads, PackedMatrix, TritonExpertBank, Uploader, pack

_WEIGHT_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Each of these is part of what a result's bits are: one value for every batch.
KV_SPLIT, DECODE_KEYS = 1024, 64  # mla_decode: positions per split, and per tile
PREFILL_KEYS, PREFILL_ROWS = 64, 128  # mla_prefill: keys and rows per tile
GATE_SPLIT = 512  # route: hidden inputs per part of the gate's product


class TritonKernelsUnavailable(RuntimeError):
    """There is no GPU for the Triton kernels, and no interpreter to stand in for it."""


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreted" if device.type == "cpu" else device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


class TritonKernels(Kernels):
    """`dtype`: bfloat16, or float32 (exact, slow). `device`: "cuda", or "cpu" under TRITON_INTERPRET=1, or "meta" with
    a `launcher` that records."""

    name = "triton"

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cuda", launcher: Launcher = launch):
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"Triton kernels compute in bfloat16 or float32, not {dtype}")
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TritonKernelsUnavailable(
                "torch sees no CUDA device: check the driver, and that torch is a CUDA build"
            )
        if self.device.type == "cpu":
            if not triton.knobs.runtime.interpret:
                raise TritonKernelsUnavailable(
                    "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before starting Python"
                )
            interpreter.install()
        self.instructions = f"{_architecture(self.device)}, Triton {triton.__version__}"
        self._launch = launcher
        self._upload = Uploader(self.device)
        self.prefill_segment = 4096  # positions whose keys and values are expanded at once; a multiple of PREFILL_KEYS
        self.decode_workspace = 1 << 28  # bytes of partial outputs of mla_decode at once

    def describe(self) -> str:
        """One line for logs and `isotherm status`."""
        where = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"interpreted on {self.device.type}"
        )
        return f"Triton {triton.__version__} kernels, {where}, {str(self.dtype).removeprefix('torch.')}"

    # --- weights ----------------------------------------------------------------------------------

    def pack_linear(self, weights: list[StoredWeight], bias: Tensor | None = None) -> LinearWeight:
        packed = pack(weights, self.dtype, self._upload)
        outputs = sum(w.data.shape[0] for w in weights)
        if bias is not None and tuple(bias.shape) != (outputs,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; {outputs} outputs need ({outputs},)")
        wide = None if bias is None else bias.to(self.device, torch.float32, copy=True)
        return LinearWeight(outputs, weights[0].data.shape[1], packed, wide, packed.nbytes)

    def pack_heads(self, weights: list[StoredWeight]) -> PackedHeads:
        weight_HNK = torch.stack([w.dequantise(self.dtype) for w in weights])
        heads, outputs, inputs = weight_HNK.shape
        data = torch.zeros(
            heads, cdiv(outputs, 128) * 128, cdiv(inputs, 128) * 128, dtype=self.dtype, device=self.device
        )
        self._upload(weight_HNK, data[:, :outputs, :inputs])
        return PackedHeads(data, outputs, inputs)

    def expert_bank(self, slots: int, hidden: int, inner: int) -> TritonExpertBank:
        return TritonExpertBank(slots, hidden, inner, self.dtype, self._upload)

    # --- dense operations -------------------------------------------------------------------------

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._norm(self._rows(x_TD, "rms_norm x"), weight_D, eps, None)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = self._rows(x_TD, "add_rms_norm x")
        if residual_TD.shape != x.shape or residual_TD.dtype != self.dtype or not residual_TD.is_contiguous():
            raise ValueError(
                f"residual must be contiguous {self.dtype} {tuple(x.shape)}, not {residual_TD.dtype} "
                f"{tuple(residual_TD.shape)}"
            )
        return self._norm(x, weight_D, eps, residual_TD)

    def _norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        rows, width = x.shape
        if weight.shape != (width,):
            raise ValueError(f"rms_norm weight has shape {tuple(weight.shape)}; x needs ({width},)")
        out = self._empty(rows, width)
        block = power_of_two(width)
        self._run(rms_norm_kernel, (rows,), 8 if block > 2048 else 4, 1, x=x, residual=residual,
                  weight=weight.to(self.dtype), out=out, D=width, stride_x=x.stride(0), eps=eps,
                  BLOCK=block)  # fmt: skip
        return out

    def linear(self, x_TK: Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        return self._linear(
            self._rows(x_TK, "linear x", weight.in_features), None, x_TK.shape[0], weight, out_dtype or self.dtype
        )

    def _linear(self, x: Tensor, index: Tensor | None, rows: int, weight: LinearWeight, dtype: torch.dtype) -> Tensor:
        """Rows x[index], or all of x. `x` may have more columns than the weight has inputs."""
        w: PackedMatrix = weight.data
        outputs, inputs = weight.out_features, weight.in_features
        out = self._empty(rows, outputs, dtype=dtype)
        tile = choose_tile(rows, w.fp8, 128 if w.splits == 1 else 64)
        # Few rows: parts of K go to programs of their own. Many: each program adds all of its parts, in the same order.
        partial = w.splits > 1 and rows <= tile.rows
        target = self._empty(w.splits, rows, outputs, dtype=torch.float32) if partial else out
        grid = (cdiv(rows, tile.rows) * cdiv(outputs, tile.outputs), w.splits if partial else 1, 1)
        self._run(
            linear_kernel, grid, tile.warps, tile.stages, x=x, index=index, w=w.data, scale=w.scale,
            scale_rows=w.scale_rows, bias=weight.bias, out=target, rows=rows, N=outputs, K=inputs, stride_x=x.stride(0),
            stride_w=w.data.stride(0), stride_scale=0 if w.scale is None else w.scale.stride(0), stride_out=outputs,
            head_x=0, head_w=0, head_out=0, K_SPLIT=w.k_split, SPLITS=w.splits, PARTIAL=partial, FP8=w.fp8,
            EVEN_K=inputs % tile.inputs == 0, BLOCK_N=tile.outputs, BLOCK_T=tile.rows, BLOCK_K=tile.inputs, GROUP=8,
        )  # fmt: skip
        if partial:
            self._run(finish_kernel, (rows, cdiv(outputs, 512)), 4, 1, partial=target, bias=weight.bias, out=out,
                      rows=rows, N=outputs, SPLITS=w.splits, BLOCK=512)  # fmt: skip
        return out

    def head_linear(self, x_THK: Tensor, weight: PackedHeads) -> Tensor:
        heads = weight.data.shape[0]
        x = self._heads(x_THK, "head_linear x", heads, weight.inputs)
        rows = x.shape[0]
        out = self._empty(rows, heads, weight.outputs)
        tile = choose_tile(rows, False)
        grid = (cdiv(rows, tile.rows) * cdiv(weight.outputs, tile.outputs), 1, heads)
        self._run(
            linear_kernel, grid, tile.warps, tile.stages, x=x, index=None, w=weight.data, scale=None, scale_rows=None,
            bias=None, out=out, rows=rows, N=weight.outputs, K=weight.inputs, stride_x=x.stride(0),
            stride_w=weight.data.stride(1), stride_scale=0, stride_out=out.stride(0), head_x=x.stride(1),
            head_w=weight.data.stride(0), head_out=weight.outputs, K_SPLIT=0, SPLITS=1, PARTIAL=False, FP8=False,
            EVEN_K=weight.inputs % tile.inputs == 0, BLOCK_N=tile.outputs, BLOCK_T=tile.rows, BLOCK_K=tile.inputs,
            GROUP=8,
        )  # fmt: skip
        return out

    def mlp(self, x_TD: Tensor, gate_up: LinearWeight, down: LinearWeight) -> Tensor:
        inner = down.in_features
        x = self._rows(x_TD, "mlp x", gate_up.in_features)
        if gate_up.out_features != 2 * inner:
            raise ValueError(
                f"mlp's gate_up gives {gate_up.out_features} outputs; down, with {inner} inputs, needs {2 * inner}"
            )
        w: PackedMatrix = gate_up.data
        rows = x.shape[0]
        hidden = self._empty(rows, inner)
        tile = choose_tile(rows, w.fp8)
        half = tile.outputs // 2
        self._run(
            gate_up_kernel, (cdiv(rows, tile.rows) * cdiv(inner, half),), tile.warps, tile.stages, x=x, w=w.data,
            scale=w.scale, scale_rows=w.scale_rows, bias=gate_up.bias, out=hidden, rows=rows, N=inner,
            K=gate_up.in_features, stride_x=x.stride(0), stride_w=w.data.stride(0),
            stride_scale=0 if w.scale is None else w.scale.stride(0), stride_out=inner, FP8=w.fp8,
            EVEN_K=gate_up.in_features % tile.inputs == 0, HALF=half, BLOCK_T=tile.rows, BLOCK_K=tile.inputs, GROUP=8,
        )  # fmt: skip
        return self.linear(hidden, down)

    def rope(self, x_THR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
        x = self._heads(x_THR, "rope x")
        rows, heads, width = x.shape
        cos, sin = cos_TR2.to(torch.float32).contiguous(), sin_TR2.to(torch.float32).contiguous()
        if width % 2 or cos.shape != (rows, width // 2) or sin.shape != cos.shape:
            raise ValueError(
                f"rope x {tuple(x.shape)} needs cos and sin of shape ({rows}, {width // 2}), not {tuple(cos.shape)}, "
                f"{tuple(sin.shape)}"
            )
        out = self._empty(rows, heads, width)
        block_h = min(32, power_of_two(heads))
        self._run(rope_kernel, (rows, cdiv(heads, block_h)), 4, 1, x=x, cos=cos, sin=sin, out=out, H=heads,
                  stride_xt=x.stride(0), stride_xh=x.stride(1), PAIRS=width // 2, BLOCK_H=block_h,
                  BLOCK_P=power_of_two(width // 2))  # fmt: skip
        return out

    # --- experts ----------------------------------------------------------------------------------

    def route(self, x_TD: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        experts, hidden = router.weight.shape
        x = self._rows(x_TD, "route x", hidden)
        if experts % router.n_group or not 0 < router.top_k <= experts or not 0 < router.topk_group <= router.n_group:
            raise ValueError(
                f"{experts} experts don't divide as {router.n_group} groups, {router.topk_group} kept, "
                f"top {router.top_k}"
            )
        rows, parts, group = x.shape[0], cdiv(hidden, GATE_SPLIT), experts // router.n_group
        partial = self._empty(parts, rows, experts, dtype=torch.float32)
        tile = min(64, max(16, power_of_two(rows)))
        self._run(
            route_scores_kernel, (cdiv(experts, 64), cdiv(rows, tile), parts), 4, 3, x=x,
            weight=router.weight.to(torch.float32).contiguous(), partial=partial, rows=rows, E=experts, D=hidden,
            stride_x=x.stride(0), D_SPLIT=GATE_SPLIT, EVEN=hidden % 64 == 0, BLOCK_E=64, BLOCK_T=tile, BLOCK_D=64,
        )  # fmt: skip
        ids, weights = (
            self._empty(rows, router.top_k, dtype=torch.int32),
            self._empty(rows, router.top_k, dtype=torch.float32),
        )
        self._run(
            route_select_kernel, (rows,), 1, 1, partial=partial, bias=router.bias.to(torch.float32).contiguous(),
            ids=ids, weights=weights, rows=rows, scaling=router.scaling, E=experts, GROUPS=router.n_group,
            GROUP_SIZE=group, KEPT=router.topk_group, TOP=router.top_k, NORMALISE=router.normalise, SPLITS=parts,
            BLOCK_G=power_of_two(router.n_group), BLOCK_S=power_of_two(group),
        )  # fmt: skip
        return ids, weights

    def experts(self, x_TD: Tensor, bank: ExpertBank, rows_P: Tensor, slots_A: Tensor, offsets_A1: Tensor) -> Tensor:
        """On a GPU an empty slot's pairs come out as NaN, since asking would mean waiting; slots on the CPU are
        checked."""
        if not isinstance(bank, TritonExpertBank):
            raise TypeError(f"triton experts need a bank made by these kernels, not a {type(bank).__name__}")
        x = self._rows(x_TD, "experts x", bank.hidden)
        if len(offsets_A1) != len(slots_A) + 1:
            raise ValueError(f"{len(slots_A)} slots need {len(slots_A) + 1} offsets, not {len(offsets_A1)}")
        pairs, active = len(rows_P), len(slots_A)
        out = self._empty(pairs, bank.hidden)
        if pairs == 0:
            return out
        if slots_A.device.type == "cpu" and (missing := bank.empty(slots_A.tolist())):
            raise KeyError(f"expert slots {missing} are empty")
        example = bank.example
        if example is None:
            raise KeyError("the bank holds no expert")
        rows, slots, offsets = (
            t.to(self.device, torch.int32, non_blocking=True).contiguous() for t in (rows_P, slots_A, offsets_A1)
        )
        up, down = example
        tile = choose_tile(cdiv(pairs, active), up.fp8)
        # Experts' rows are cut apart, so there are at most this many row tiles; programs past the last return at once.
        row_tiles = min(pairs, pairs // tile.rows + active)
        hidden = self._empty(pairs, bank.inner)
        block_a, half = power_of_two(active), tile.outputs // 2
        shared: dict[str, Any] = {"slots": slots, "offsets": offsets, "active": active,
                                  "WEIGHT": _WEIGHT_TYPES[up.data.dtype], "BLOCK_T": tile.rows, "BLOCK_K": tile.inputs,
                                  "BLOCK_A": block_a}  # fmt: skip
        self._run(
            expert_gate_up_kernel, (row_tiles * cdiv(bank.inner, half),), tile.warps, tile.stages, **shared, x=x,
            pair_rows=rows, table=bank.tables[0], scale_table=bank.tables[1], scale_rows=up.scale_rows, out=hidden,
            N=bank.inner, K=bank.hidden, stride_x=x.stride(0), stride_w=up.data.stride(0),
            stride_scale=0 if up.scale is None else up.scale.stride(0), EVEN_K=bank.hidden % tile.inputs == 0,
            HALF=half,
        )  # fmt: skip
        self._run(
            expert_down_kernel, (row_tiles * cdiv(bank.hidden, tile.outputs),), tile.warps, tile.stages, **shared,
            h=hidden, table=bank.tables[2], scale_table=bank.tables[3], scale_rows=down.scale_rows, out=out,
            N=bank.hidden, K=bank.inner, stride_w=down.data.stride(0),
            stride_scale=0 if down.scale is None else down.scale.stride(0), EVEN_K=bank.inner % tile.inputs == 0,
            BLOCK_N=tile.outputs,
        )  # fmt: skip
        return out

    def combine(
        self,
        y_PD: Tensor,
        index_Tk: Tensor,
        weights_Tk: Tensor,
        own_TD: Tensor | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        y = self._rows(y_PD, "combine y")
        if index_Tk.dim() != 2 or index_Tk.shape != weights_Tk.shape or index_Tk.shape[1] < 1:
            raise ValueError(
                f"combine's index {tuple(index_Tk.shape)} and weights {tuple(weights_Tk.shape)} must be one [T, k]"
            )
        (rows, k), width = index_Tk.shape, y.shape[1]
        out = self._empty(rows, width)
        block = min(1024, power_of_two(width))
        index, weights = index_Tk.to(self.device).contiguous(), weights_Tk.to(self.device, torch.float32).contiguous()
        self._run(combine_kernel, (rows, cdiv(width, block)), 4, 1, y=y, index=index, weights=weights,
                  out=out, D=width, stride_y=y.stride(0), TOP=k, BLOCK=block)  # fmt: skip
        for term in (own_TD, residual_TD):
            if term is not None:
                out = out + term
        return out

    # --- attention --------------------------------------------------------------------------------

    def write_cache(self, latent_TC: Tensor, k_rope_TR: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        latent, rope = self._rows(latent_TC, "write_cache latent"), self._rows(k_rope_TR, "write_cache key")
        self._cache(cache, latent.shape[1] + rope.shape[1])
        if not len(latent) == len(rope) == len(slots_T):
            raise ValueError(f"write_cache has {len(latent)} latents, {len(rope)} keys and {len(slots_T)} slots")
        block = power_of_two(max(latent.shape[1], rope.shape[1]))
        self._run(write_cache_kernel, (len(latent),), 4, 1, latent=latent, rope=rope, cache=cache,
                  slots=slots_T.contiguous(), C=latent.shape[1], R=rope.shape[1], stride_latent=latent.stride(0),
                  stride_rope=rope.stride(0), BLOCK=block)  # fmt: skip

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
        block_size = self._cache(cache, kv_b.in_features + rotary)
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
        entries = cache.view(-1, cache.shape[-1])
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
            expanded = self._linear(entries, slots[segment:end], end - segment, kv_b, self.dtype)
            self._run(
                mla_prefill_kernel, (cdiv(rows, PREFILL_ROWS), heads), 8, 3, q=q, expanded=expanded, cache=cache,
                slots=slots, state_acc=state_acc, state_ml=state_ml, out=out, scale=scale, rows=rows, start=start,
                segment=segment, segment_end=end, H=heads, C=kv_b.in_features, R=rotary, NOPE=nope, V=v_head_dim,
                stride_qt=q.stride(0), stride_qh=q.stride(1), stride_kv=expanded.stride(0), FIRST=segment == 0,
                LAST=end == length, EVEN=even, BLOCK_T=PREFILL_ROWS, BLOCK_L=PREFILL_KEYS, **blocks,
            )  # fmt: skip
        return out

    def mla_decode(self, q_latent_THC: Tensor, q_rope_THR: Tensor, cache: Tensor, block_tables_SM: Tensor,
                   sequence_T: Tensor, lengths_T: Tensor, scale: float) -> Tensor:  # fmt: skip
        q = self._heads(q_latent_THC, "mla_decode q_latent")
        rows, heads, latent = q.shape
        q_rope = self._heads(q_rope_THR, "mla_decode q_rope", heads)
        rotary = q_rope.shape[2]
        block_size = self._cache(cache, latent + rotary)
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
        # The partial outputs of a long table's rows would fill the memory, so rows are taken some at a time.
        at_once = rows if splits == 1 else max(1, min(rows, self.decode_workspace // (splits * heads * latent * 4)))
        partial = self._empty(at_once, splits, heads, latent, dtype=torch.float32) if splits > 1 else None
        partial_ml = self._empty(at_once, splits, 2, heads, dtype=torch.float32) if splits > 1 else None
        for first in range(0, rows, max(1, at_once)):
            some = slice(first, min(first + at_once, rows))
            count = some.stop - some.start
            self._run(
                mla_decode_kernel, (count * cdiv(heads, 64), splits), 8, 2, q_latent=q[some], q_rope=q_rope[some],
                cache=cache, tables=tables, sequence=sequence[some], lengths=lengths[some], out=out[some],
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

    # --- sampling ---------------------------------------------------------------------------------

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
        if any(t.shape != (rows,) for t in (temperature_T, top_p_T, top_k_T, seed_T, index_T)):
            raise ValueError(f"sample has {rows} rows of logits; every parameter must have shape ({rows},)")
        # The one wait, where these are on the GPU
        filtered = ((temperature_T > 0) & ((top_p_T < 1) | (top_k_T > 0))).nonzero().flatten()
        temperature, top_p = (t.to(self.device, torch.float64).contiguous() for t in (temperature_T, top_p_T))
        top_k, seed, index = (t.to(self.device, torch.int64).contiguous() for t in (top_k_T, seed_T, index_T))
        out = self._empty(rows, dtype=torch.int64)
        if len(filtered) < rows:
            chunks = cdiv(vocab, 1024)
            best_value, best_id = (
                self._empty(rows, chunks, dtype=torch.float64),
                self._empty(rows, chunks, dtype=torch.int64),
            )
            self._run(sample_chunk_kernel, (rows, chunks), 4, 1, logits=logits, temperature=temperature, seed=seed,
                      index=index, best_value=best_value, best_id=best_id, V=vocab, stride=logits.stride(0),
                      chunks=chunks, BLOCK=1024)  # fmt: skip
            self._run(sample_merge_kernel, (rows,), 4, 1, best_value=best_value, best_id=best_id, out=out,
                      chunks=chunks, BLOCK=power_of_two(chunks))  # fmt: skip
        if len(filtered) > 0:
            filtered = filtered.to(self.device)
            # A sort is exact, so torch's may take all rows at once; division by a column is not turned into a product,
            # as by a scalar it may be.
            scaled, ids = (logits[filtered] / temperature[filtered].float()[:, None]).sort(descending=True, stable=True)
            self._run(sample_filtered_kernel, (len(filtered),), 8, 1, scaled=scaled, ids=ids, rows_of=filtered,
                      top_p=top_p, top_k=top_k, seed=seed, index=index, out=out, V=vocab, BLOCK=2048)  # fmt: skip
        return out

    # --- the boundary -----------------------------------------------------------------------------

    def _run(self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int, **arguments: Any) -> None:
        if 0 not in grid:
            self._launch(kernel, grid, arguments, warps, stages)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def _rows(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """x as rows in `dtype`, each contiguous; rows may lie apart."""
        if x.dim() != 2 or x.dtype != self.dtype or (width is not None and x.shape[1] != width):
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; {self.dtype} [T, {'*' if width is None else width}] is needed"
            )
        return x if x.stride(1) == 1 else x.contiguous()

    def _heads(self, x: Tensor, name: str, heads: int | None = None, width: int | None = None) -> Tensor:
        fits = x.dim() == 3 and x.dtype == self.dtype and heads in (None, x.shape[1]) and width in (None, x.shape[2])
        if not fits:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; {self.dtype} [T, {heads or 'H'}, {width or '*'}] is needed"
            )
        return x if x.stride(2) == 1 else x.contiguous()

    def _cache(self, cache: Tensor, entry: int) -> int:
        """The cache's block size."""
        if cache.dim() != 3 or cache.dtype != self.dtype or cache.shape[2] != entry or not cache.is_contiguous():
            raise ValueError(
                f"the cache is {cache.dtype} {tuple(cache.shape)}; contiguous {self.dtype} "
                f"[blocks, block size, {entry}] is needed"
            )
        if cache.numel() >= 2**31:
            raise ValueError(
                f"a layer's cache of {cache.numel()} values is too large: kernels address fewer than 2³¹; "
                "use fewer blocks"
            )
        return cache.shape[1]
