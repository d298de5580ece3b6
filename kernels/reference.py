"""Every operation in plain torch: the definition of correct, and the backend of a machine without a compiler."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from isotherm.kernels.cache_rows import fp8_rows, is_fp8, read_rows
from isotherm.kernels.checked import check_mlp
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.ops import Kernels, LinearWeight, Router


class ReferenceExpertBank(ExpertBank):
    """Experts as dequantised tensors: gate and up stacked [2 × inner, hidden], down [hidden, inner]."""

    def __init__(self, slots: int, dtype: torch.dtype):
        self.dtype = dtype
        self.gate_up: list[Tensor | None] = [None] * slots
        self.down: list[Tensor | None] = [None] * slots

    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        self.gate_up[slot] = torch.cat([gate.dequantise(self.dtype), up.dequantise(self.dtype)])
        # A copy also where nothing is converted: see pack_linear
        self.down[slot] = torch.cat([down.dequantise(self.dtype)])

    def drop(self, slot: int) -> None:
        self.gate_up[slot] = self.down[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.gate_up, *self.down) if t is not None)


class ReferenceKernels(Kernels):
    """Plain torch on any device, float32 or bfloat16. Weights are dequantised when they are packed."""

    name = "reference"

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.instructions = f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"

    def pack_linear(self, weights: list[StoredWeight], bias: Tensor | None = None) -> LinearWeight:
        # Always a copy: the stored tensors may be views of a mapped file that is about to be closed.
        data = torch.cat([w.dequantise(self.dtype) for w in weights]).contiguous()
        return LinearWeight(data.shape[0], data.shape[1], data, None if bias is None else bias.float(), data.nbytes)

    def pack_heads(self, weights: list[StoredWeight]) -> Tensor:
        return torch.stack([w.dequantise(self.dtype).T for w in weights])  # [H, K, N], ready for bmm

    def expert_bank(self, slots: int, hidden: int, inner: int) -> ReferenceExpertBank:
        return ReferenceExpertBank(slots, self.dtype)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return weight_D.to(self.dtype) * x.to(self.dtype)

    def linear(self, x_TK: Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> Tensor:
        out = F.linear(x_TK, weight.data)
        if weight.bias is not None:
            out = out.float() + weight.bias
        return out.to(out_dtype or self.dtype)

    def head_linear(self, x_THK: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(x_THK.transpose(0, 1), weight).transpose(0, 1)

    def mlp(self, x_TD: Tensor, gate_up: LinearWeight, down: LinearWeight) -> Tensor:
        check_mlp(gate_up, down)
        return self.linear(_swiglu(self.linear(x_TD, gate_up)), down)

    def rope(self, x_THR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
        even, odd = x_THR.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos_TR2[:, None], sin_TR2[:, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x_THR.dtype)

    def route(self, x_TD: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        scores = F.linear(x_TD.float(), router.weight.float()).sigmoid()
        biased = scores + router.bias
        groups = biased.unflatten(-1, (router.n_group, -1))  # [T, n_group, E / n_group]
        group_score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        # Stable sorts, so that equal scores go to the lower index on every backend.
        kept = group_score.sort(dim=-1, descending=True, stable=True).indices[:, : router.topk_group]
        allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, kept, True)
        biased = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        ids = biased.sort(dim=-1, descending=True, stable=True).indices[:, : router.top_k].sort(dim=-1).values
        weights = scores.gather(1, ids)
        if router.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids.to(torch.int32), weights * router.scaling

    def experts(self, x_TD: Tensor, bank: ExpertBank, rows_P: Tensor, slots_A: Tensor, offsets_A1: Tensor) -> Tensor:
        assert isinstance(bank, ReferenceExpertBank)
        out_PD = torch.empty(len(rows_P), x_TD.shape[1], dtype=self.dtype, device=x_TD.device)
        if len(rows_P) == 0:
            return out_PD
        # One batched product over the active experts, their rows padded to the longest run.
        counts_A = offsets_A1.diff().long()
        expert_P = torch.repeat_interleave(torch.arange(len(counts_A), device=x_TD.device), counts_A)
        place_P = torch.arange(len(rows_P), device=x_TD.device) - offsets_A1[:-1].long()[expert_P]
        x_ALD = x_TD.new_zeros(len(counts_A), int(counts_A.max()), x_TD.shape[1])
        x_ALD[expert_P, place_P] = x_TD[rows_P.long()]
        slots = slots_A.tolist()
        gate_up = [g for s in slots if (g := bank.gate_up[s]) is not None]
        down = [d for s in slots if (d := bank.down[s]) is not None]
        if len(gate_up) != len(slots):
            raise KeyError(f"expert slots {[s for s in slots if bank.gate_up[s] is None]} are empty")
        y_ALD = torch.bmm(
            _swiglu(torch.bmm(x_ALD, torch.stack(gate_up).transpose(1, 2))), torch.stack(down).transpose(1, 2)
        )
        return y_ALD[expert_P, place_P]

    def combine(
        self,
        y_PD: Tensor,
        index_Tk: Tensor,
        weights_Tk: Tensor,
        own_TD: Tensor | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        y_TkD = y_PD[index_Tk.long()].float() * weights_Tk[..., None]
        total = y_TkD[:, 0]
        for j in range(1, y_TkD.shape[1]):
            total = total + y_TkD[:, j]
        out_TD = total.to(self.dtype)
        for term in (own_TD, residual_TD):
            if term is not None:
                out_TD = out_TD + term
        return out_TD

    def write_cache(self, latent_TC: Tensor, k_rope_TR: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        rows = fp8_rows(latent_TC, k_rope_TR) if is_fp8(cache) else torch.cat([latent_TC, k_rope_TR], -1)
        cache.view(-1, cache.shape[-1])[slots_T] = rows

    def mla_prefill(
        self,
        q_THQ: Tensor,
        cache: Tensor,
        block_table_M: Tensor,
        start: int,
        kv_b: LinearWeight,
        v_head_dim: int,
        scale: float,
    ) -> Tensor:
        rows, heads, qk_dim = q_THQ.shape
        length, latent_dim = start + rows, kv_b.in_features
        nope_dim = kv_b.out_features // heads - v_head_dim
        stored_L = cache[block_table_M.long()].flatten(0, 1)[:length]
        entries_L = read_rows(stored_L, latent_dim, qk_dim - nope_dim, self.dtype)
        kv_LHX = self.linear(entries_L[:, :latent_dim], kv_b).unflatten(-1, (heads, -1))
        assert qk_dim - nope_dim == entries_L.shape[1] - latent_dim
        k_LHQ = torch.cat([kv_LHX[..., :nope_dim], entries_L[:, None, latent_dim:].expand(-1, heads, -1)], -1)
        scores_HTL = torch.einsum("thq,lhq->htl", q_THQ.float(), k_LHQ.float()) * scale
        future = (
            torch.arange(length, device=cache.device)[None] > torch.arange(start, length, device=cache.device)[:, None]
        )
        weights_HTL = scores_HTL.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("htl,lhv->thv", weights_HTL, kv_LHX[..., nope_dim:].float()).flatten(1).to(self.dtype)

    def mla_decode(
        self,
        q_latent_THC: Tensor,
        q_rope_THR: Tensor,
        cache: Tensor,
        block_tables_SM: Tensor,
        sequence_T: Tensor,
        lengths_T: Tensor,
        scale: float,
    ) -> Tensor:
        latent_dim, block_size = q_latent_THC.shape[-1], cache.shape[1]
        blocks = -(-int(lengths_T.max()) // block_size)
        stored_SL = cache[block_tables_SM[:, :blocks].long()].flatten(1, 2)
        entries_SL = read_rows(stored_SL, latent_dim, q_rope_THR.shape[-1], self.dtype)
        entries_TL = entries_SL[sequence_T.long()].float()  # [T, L, C + R]
        latents_TLC, keys_TLR = entries_TL[..., :latent_dim], entries_TL[..., latent_dim:]
        scores_THL = q_latent_THC.float() @ latents_TLC.transpose(1, 2) + q_rope_THR.float() @ keys_TLR.transpose(1, 2)
        beyond = torch.arange(scores_THL.shape[-1], device=cache.device)[None, None] >= lengths_T[:, None, None]
        # Blocks past a row's end may hold anything, NaN included, so they are masked on both sides of the softmax.
        weights_THL = (scores_THL * scale).masked_fill(beyond, -torch.inf).softmax(-1)
        return (weights_THL @ latents_TLC.masked_fill(beyond.transpose(1, 2), 0.0)).to(self.dtype)

    def sample(
        self,
        logits_TV: Tensor,
        temperature_T: Tensor,
        top_p_T: Tensor,
        top_k_T: Tensor,
        seed_T: Tensor,
        index_T: Tensor,
    ) -> Tensor:
        out_T = logits_TV.argmax(-1).masked_fill(logits_TV.isnan().all(-1), -1)
        for t in ((temperature_T > 0) & (out_T >= 0)).nonzero().flatten().tolist():
            ids, logits = candidates(logits_TV[t] / float(temperature_T[t]), float(top_p_T[t]), int(top_k_T[t]))
            noisy = logits.double() + gumbel_noise(int(seed_T[t]), int(index_T[t]), ids)
            out_T[t] = ids[noisy.argmax()]
        return out_T


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def candidates(logits_V: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Token ids and logits that top-k, then top-p leave of one row, most likely first (equal ones by id). At least
    one."""
    if top_p >= 1.0 and top_k <= 0:
        return torch.arange(len(logits_V), device=logits_V.device), logits_V
    sorted_V, ids_V = logits_V.sort(descending=True, stable=True)
    if top_k > 0:
        sorted_V, ids_V = sorted_V[:top_k], ids_V[:top_k]
    if top_p < 1.0:
        before = sorted_V.double().softmax(-1).cumsum(-1)
        keep = max(1, int((before < top_p).sum()) + 1)
        sorted_V, ids_V = sorted_V[:keep], ids_V[:keep]
    return ids_V, sorted_V


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) on int64 tensors that stand for uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def gumbel_noise(seed: int, index: int, ids: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, float64, for token ids of the index-th token of a request: -log(-log(u)), u = (top 53 bits of
    h + ½) / 2⁵³ with h = mix(mix(mix(seed) + index) + id) mod 2⁶⁴ and golden-ratio increments. A function of (seed,
    index, id) alone."""
    golden = 0x9E3779B97F4A7C15
    key = _mix(torch.tensor([_signed(seed + golden)]))
    key = _mix(key + _signed(golden * (index + 1)))
    bits = _mix(key.to(ids.device) + ids * _signed(golden))
    uniform = (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))
