"""The operations on an NVIDIA GPU in Triton (`kernels/triton/`): shapes are checked, outputs allocated and tiles chosen
here.

The package's docstring says what has been checked, and why a row's bits don't depend on its company. Nothing here reads
a tensor's values on a GPU, so no call waits for the device, but for `sample`, which asks once which rows have top-k or
top-p.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from isotherm.kernels.checked import check_mlp, check_router, check_weights
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.ops import LinearWeight, Router
from isotherm.kernels.triton.attention import TritonAttention
from isotherm.kernels.triton.elementwise import combine_kernel, rms_norm_kernel, rope_kernel
from isotherm.kernels.triton.gemm import choose_tile, finish_kernel, gate_up_kernel, linear_kernel
from isotherm.kernels.triton.grouped import expert_down_kernel, expert_gate_up_kernel
from isotherm.kernels.triton.launch import cdiv, power_of_two
from isotherm.kernels.triton.route import route_scores_kernel, route_select_kernel
from isotherm.kernels.triton.sample import sample_chunk_kernel, sample_filtered_kernel, sample_merge_kernel
from isotherm.kernels.triton.weights import PackedHeads, PackedMatrix, TritonExpertBank, Variant, pack

_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
          torch.float32: tl.float32, torch.uint8: tl.uint8, torch.int8: tl.int8}  # fmt: skip

# Part of what a result's bits are: one value for every batch.
GATE_SPLIT = 512  # route: hidden inputs per part of the gate's product


class TritonKernels(TritonAttention):
    """`dtype`: bfloat16, or float32 (exact, slow). `device`: "cuda", or "cpu" under TRITON_INTERPRET=1, or "meta" with
    a `launcher` that records."""

    # --- weights ----------------------------------------------------------------------------------

    def pack_linear(self, weights: list[StoredWeight], bias: Tensor | None = None) -> LinearWeight:
        outputs, inputs = check_weights(weights, bias)
        packed = pack(weights, self.dtype, self._upload)
        wide = None if bias is None else bias.to(self.device, torch.float32, copy=True)
        return LinearWeight(outputs, inputs, packed, wide, packed.nbytes)

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
        return self._norm(x, weight_D, eps, self._residual(residual_TD, x))

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
        tile = choose_tile(rows, w.scaled, 128 if w.splits == 1 else 64)
        # Few rows: parts of K go to programs of their own. Many: each program adds all of its parts, in the same order.
        partial = w.splits > 1 and rows <= tile.rows
        target = self._empty(w.splits, rows, outputs, dtype=torch.float32) if partial else out
        grid = (cdiv(rows, tile.rows) * cdiv(outputs, tile.outputs), w.splits if partial else 1, 1)
        self._run(
            linear_kernel, grid, tile.warps, tile.stages, x=x, index=index, w=w.data, scale=w.scale,
            scale_rows=w.scale_rows, zeros=w.zeros, bias=weight.bias, out=target, rows=rows, N=outputs, K=inputs,
            stride_x=x.stride(0), stride_w=w.data.stride(0), stride_scale=w.stride_scale, stride_out=outputs,
            head_x=0, head_w=0, head_out=0, K_SPLIT=w.k_split, SPLITS=w.splits, PARTIAL=partial, FP8=w.fp8,
            GROUP=w.group, EVEN_K=inputs % tile.inputs == 0, BLOCK_N=tile.outputs, BLOCK_T=tile.rows,
            BLOCK_K=tile.inputs, TOGETHER=8,
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
        tile = choose_tile(rows, 0)
        grid = (cdiv(rows, tile.rows) * cdiv(weight.outputs, tile.outputs), 1, heads)
        self._run(
            linear_kernel, grid, tile.warps, tile.stages, x=x, index=None, w=weight.data, scale=None, scale_rows=None,
            zeros=None, bias=None, out=out, rows=rows, N=weight.outputs, K=weight.inputs, stride_x=x.stride(0),
            stride_w=weight.data.stride(1), stride_scale=0, stride_out=out.stride(0), head_x=x.stride(1),
            head_w=weight.data.stride(0), head_out=weight.outputs, K_SPLIT=0, SPLITS=1, PARTIAL=False, FP8=False,
            GROUP=0, EVEN_K=weight.inputs % tile.inputs == 0, BLOCK_N=tile.outputs, BLOCK_T=tile.rows,
            BLOCK_K=tile.inputs, TOGETHER=8,
        )  # fmt: skip
        return out

    def mlp(self, x_TD: Tensor, gate_up: LinearWeight, down: LinearWeight) -> Tensor:
        inner = down.in_features
        x = self._rows(x_TD, "mlp x", gate_up.in_features)
        if gate_up.out_features != 2 * inner:
            raise ValueError(
                f"mlp's gate_up gives {gate_up.out_features} outputs; down, with {inner} inputs, needs {2 * inner}"
            )
        check_mlp(gate_up, down)
        w: PackedMatrix = gate_up.data
        rows = x.shape[0]
        hidden = self._empty(rows, inner)
        tile = choose_tile(rows, w.scaled)
        half = tile.outputs // 2
        self._run(
            gate_up_kernel, (cdiv(rows, tile.rows) * cdiv(inner, half),), tile.warps, tile.stages, x=x, w=w.data,
            scale=w.scale, scale_rows=w.scale_rows, zeros=w.zeros, bias=gate_up.bias, out=hidden, rows=rows, N=inner,
            K=gate_up.in_features, stride_x=x.stride(0), stride_w=w.data.stride(0), stride_scale=w.stride_scale,
            stride_out=inner, FP8=w.fp8, GROUP=w.group, EVEN_K=gate_up.in_features % tile.inputs == 0, HALF=half,
            BLOCK_T=tile.rows, BLOCK_K=tile.inputs, TOGETHER=8,
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
        check_router(router)
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

    def moe(
        self,
        x_TD: Tensor,
        router: Router,
        bank: ExpertBank,
        slot_of_E: Tensor,
        gate_up: LinearWeight | None,
        down: LinearWeight | None,
        residual_TD: Tensor,
    ) -> Tensor:
        """Every expert is given its rows, be they none, so that nobody need wait to learn which have any."""
        ids_Tk, weights_Tk = self.route(x_TD, router)
        chosen_P, order_P = ids_Tk.flatten().sort(stable=True)
        bounds = torch.arange(len(slot_of_E) + 1, dtype=torch.int32, device=self.device)
        offsets = torch.searchsorted(chosen_P, bounds, out_int32=True)
        y_PD = self.experts(x_TD, bank, order_P // ids_Tk.shape[1], slot_of_E, offsets)
        index_P = torch.empty_like(order_P)
        index_P[order_P] = torch.arange(len(order_P), device=self.device)
        own_TD = None if gate_up is None or down is None else self.mlp(x_TD, gate_up, down)
        return self.combine(y_PD, index_P.view(ids_Tk.shape), weights_Tk, own_TD, residual_TD)

    def experts(self, x_TD: Tensor, bank: ExpertBank, rows_P: Tensor, slots_A: Tensor, offsets_A1: Tensor) -> Tensor:
        """On a GPU an empty slot's pairs come out as NaN, since asking would mean waiting; slots on the CPU are
        checked."""
        if not isinstance(bank, TritonExpertBank):
            raise TypeError(f"triton experts need a bank made by these kernels, not a {type(bank).__name__}")
        x = self._rows(x_TD, "experts x", bank.hidden)
        if len(offsets_A1) != len(slots_A) + 1:
            raise ValueError(f"{len(slots_A)} slots need {len(slots_A) + 1} offsets, not {len(offsets_A1)}")
        pairs = len(rows_P)
        out = self._empty(pairs, bank.hidden)
        if pairs == 0:
            return out
        if slots_A.device.type == "cpu" and (missing := bank.empty(slots_A.tolist())):
            raise KeyError(f"expert slots {missing} are empty")
        if not bank.variants:
            raise KeyError("the bank holds no expert")
        rows, slots, offsets = (
            t.to(self.device, torch.int32, non_blocking=True).contiguous() for t in (rows_P, slots_A, offsets_A1)
        )
        hidden = self._empty(pairs, bank.inner)
        for i, variant in enumerate(bank.variants):
            self._experts(x, bank, variant, (rows, slots, offsets), hidden, out, empty=i == 0)
        return out

    def _experts(self, x: Tensor, bank: TritonExpertBank, variant: Variant, pairs: tuple[Tensor, Tensor, Tensor],
                 hidden: Tensor, out: Tensor, empty: bool) -> None:  # fmt: skip
        """Those that are stored as `variant` says; with `empty`, NaN for the pairs of empty slots."""
        (rows, slots, offsets), (up, down) = pairs, variant.example
        active = len(slots)
        tile = choose_tile(cdiv(len(rows), active), up.scaled)
        # Experts' rows are cut apart, so there are at most this many row tiles; programs past the last return at once.
        row_tiles = min(len(rows), len(rows) // tile.rows + active)
        half = tile.outputs // 2
        shared: dict[str, Any] = {"slots": slots, "offsets": offsets, "forms": bank.forms, "active": active,
                                  "form": variant.id, "BLOCK_T": tile.rows, "BLOCK_K": tile.inputs,
                                  "BLOCK_A": power_of_two(active), "EMPTY": empty}  # fmt: skip
        self._run(
            expert_gate_up_kernel, (row_tiles * cdiv(bank.inner, half),), tile.warps, tile.stages, **shared,
            **_expert_weight(up, bank.tables[:3]), x=x, pair_rows=rows, out=hidden, N=bank.inner, K=bank.hidden,
            stride_x=x.stride(0), EVEN_K=bank.hidden % tile.inputs == 0, HALF=half,
        )  # fmt: skip
        self._run(
            expert_down_kernel, (row_tiles * cdiv(bank.hidden, tile.outputs),), tile.warps, tile.stages, **shared,
            **_expert_weight(down, bank.tables[3:]), h=hidden, out=out, N=bank.hidden, K=bank.inner,
            EVEN_K=bank.inner % tile.inputs == 0, BLOCK_N=tile.outputs,
        )  # fmt: skip

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


def _expert_weight(example: PackedMatrix, tables: Tensor) -> dict[str, Any]:
    """Arguments that tell how a weight of an expert is stored, and where those of all slots are."""
    scale = example.scale
    return {"table": tables[0], "scale_table": tables[1], "zero_table": None if example.zeros is None else tables[2],
            "scale_rows": example.scale_rows, "stride_w": example.data.stride(0), "stride_scale": example.stride_scale,
            "WEIGHT": _TYPES[example.data.dtype], "SCALE": tl.float32 if scale is None else _TYPES[scale.dtype],
            "GROUP": example.group}  # fmt: skip
