"""The multi-token-prediction layer stated in plain torch, written from DeepSeek-V3's report (arXiv:2412.19437, §2.2)
and the names of the published tensors; and the layer itself, loaded from the same checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.models.local_experts import LocalExperts
from isotherm.actors.models.protocol import AttentionModel
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.reference import ReferenceKernels


def loaded(path: Path, positions: int = 64) -> tuple[AttentionModel, LocalExperts]:
    """A checkpoint's model with the layer, and all routed experts, in float32."""
    checkpoint, kernels = Checkpoint.open(path).with_mtp(), ReferenceKernels(torch.float32)
    config = checkpoint.config
    with WeightReader(checkpoint) as reader:
        model = load_model(config, kernels, reader, positions)
        worker = ExpertWorker(config, kernels, slots=len(config.moe_layers) * config.n_routed_experts)
        worker.load(reader, [(layer, e) for layer in config.moe_layers for e in range(config.n_routed_experts)])
    return model, LocalExperts(kernels, worker.bank, worker.slot_of)


class Stated:
    """Of a checkpoint with plain rotary embedding, in float32: position i takes the main model's normed output at i and
    the token at i + 1, and gives logits for the token at i + 2."""

    def __init__(self, path: Path):
        self.config = Checkpoint.open(path).config
        self.t = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
        self.p = f"model.layers.{self.config.num_hidden_layers}"

    def w(self, name: str) -> Tensor:
        return self.t[f"{self.p}.{name}.weight"]

    def norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.rms_norm_eps if eps is None else eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotated(self, x: Tensor) -> Tensor:
        """Pairs (2i, 2i+1) turned by position × theta^(-2i/R); x [S, H, R]."""
        width = x.shape[-1]
        angles = torch.arange(len(x))[:, None] * self.config.rope.theta ** (-torch.arange(0, width, 2) / width)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def attention(self, x: Tensor) -> Tensor:
        c, a = self.config, "self_attn"
        heads, nope, rope, value = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        q = self.norm(x @ self.w(f"{a}.q_a_proj").T, self.w(f"{a}.q_a_layernorm"), 1e-6) @ self.w(f"{a}.q_b_proj").T
        q_nope, q_rope = q.unflatten(-1, (heads, nope + rope)).split([nope, rope], -1)
        latent, k_rope = (x @ self.w(f"{a}.kv_a_proj_with_mqa").T).split([c.kv_lora_rank, rope], -1)
        kv = self.norm(latent, self.w(f"{a}.kv_a_layernorm"), 1e-6) @ self.w(f"{a}.kv_b_proj").T
        k_nope, v = kv.unflatten(-1, (heads, nope + value)).split([nope, value], -1)
        k = torch.cat([k_nope, self.rotated(k_rope[:, None]).expand(-1, heads, -1)], -1)
        q = torch.cat([q_nope, self.rotated(q_rope)], -1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(nope + rope)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ self.w(f"{a}.o_proj").T

    def mlp(self, x: Tensor, p: str) -> Tensor:
        return (F.silu(x @ self.w(f"{p}.gate_proj").T) * (x @ self.w(f"{p}.up_proj").T)) @ self.w(f"{p}.down_proj").T

    def experts(self, x: Tensor) -> Tensor:
        c = self.config
        scores = (x @ self.w("mlp.gate").T).sigmoid()
        biased = scores + self.t[f"{self.p}.mlp.gate.e_score_correction_bias"]
        groups = biased.unflatten(-1, (c.n_group, -1)).topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
        allowed = torch.zeros(len(x), c.n_group).scatter(1, groups, 1.0).bool()
        per_group = c.n_routed_experts // c.n_group
        ids = (
            biased.masked_fill(~allowed.repeat_interleave(per_group, 1), -math.inf).topk(c.num_experts_per_tok).indices
        )
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) if c.norm_topk_prob else weights
        out = self.mlp(x, "mlp.shared_experts")
        for row in range(len(x)):
            for weight, expert in zip(weights[row] * c.routed_scaling_factor, ids[row].tolist(), strict=True):
                out[row] += weight * self.mlp(x[row], f"mlp.experts.{expert}")
        return out

    def feed_forward(self, x: Tensor) -> Tensor:
        """JoyAI-LLM-Flash's is dense (arXiv:2604.03044, §2.1)."""
        return self.mlp(x, "mlp") if self.config.model_type == "joyai_llm_flash" else self.experts(x)

    def predict(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [S, D], after the main model's final norm; tokens [S], those that come next → the layer's own hidden
        states [S, D], after its norm, and logits [S, V]."""
        embedding = self.t.get(f"{self.p}.embed_tokens.weight", self.t["model.embed_tokens.weight"])
        head = self.t.get(f"{self.p}.shared_head.head.weight", self.t.get("lm_head.weight", embedding))
        pair = torch.cat([self.norm(embedding[tokens], self.w("enorm")), self.norm(hidden, self.w("hnorm"))], -1)
        x = pair @ self.w("eh_proj").T
        x = x + self.attention(self.norm(x, self.w("input_layernorm")))
        x = x + self.feed_forward(self.norm(x, self.w("post_attention_layernorm")))
        out = self.norm(x, self.w("shared_head.norm"))
        return out, out @ head.T

    def main_norm(self, output: Tensor) -> Tensor:
        """What `predict` takes of the main model's last layer."""
        return self.norm(output, self.t["model.norm.weight"])

    def chain(self, output: Tensor, tokens: Tensor, count: int) -> list[int]:
        """The layer applied again and again to what it gave. `output` [S, D] of the main model's last layer, `tokens`
        [S] those that come next → the likeliest `count` tokens after these."""
        hidden, drafts = self.main_norm(output), list[int]()
        for _ in range(count):
            made, logits = self.predict(hidden, torch.cat([tokens, torch.tensor(drafts, dtype=torch.int64)]))
            drafts.append(int(logits[-1].argmax()))
            hidden = torch.cat([hidden, made[-1:]])
        return drafts
