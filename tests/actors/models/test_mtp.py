"""The multi-token-prediction layer beside a statement of it in plain torch, written from DeepSeek-V3's report
(arXiv:2412.19437, §2.2) and the names of the published tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepseek_checkpoints import make_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.local import LocalExperts
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.step_batch import Span, attention_rows
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.sequence import Form
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError
from isotherm.kernels.reference import ReferenceKernels

TOKENS = 23
BLOCKS = [3, 0, 5, 1, 4, 2]  # of four tokens


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


def own_copies(tensors: dict[str, Tensor]) -> None:
    """Embedding and head of the layer's own, unlike the main model's."""
    for name in [name for name in tensors if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]:
        if name.startswith("model.layers."):
            tensors[name] = tensors[name].flip(0).contiguous()


def no_copies(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]:
        if name.startswith("model.layers."):
            del tensors[name]


FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "glm4_moe_lite": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5},
    "joyai_llm_flash": {"n_group": 1, "topk_group": 1, "rope_theta": 3.2e7},
}


@pytest.mark.parametrize("change", [lambda _: None, own_copies, no_copies], ids=["copies", "own", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_are_those_of_the_statement(tmp_path: Path, family: str, change):
    """Also applied to its own output, in both forms of attention."""
    config = {"model_type": family, "vocab_size": 200, **FAMILIES[family]}
    make_checkpoint(tmp_path, config, dtype="float32", mtp=True, change=change)
    checkpoint, kernels = Checkpoint.open(tmp_path).with_mtp(), ReferenceKernels(torch.float32)
    config = checkpoint.config
    assert config.model_type == family
    with WeightReader(checkpoint) as reader:
        model = load_model(config, kernels, reader, 64)
        worker = ExpertWorker(config, kernels, slots=len(config.moe_layers) * config.n_routed_experts)
        worker.load(reader, [(layer, e) for layer in config.moe_layers for e in range(config.n_routed_experts)])
    experts, stated = LocalExperts(worker), Stated(tmp_path)
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(200, (TOKENS,), generator=rng)
    output = torch.randn(TOKENS, config.hidden_size, generator=rng)  # of the main model's last layer
    expected = stated.norm(output, stated.t["model.norm.weight"])

    assert model.mtp is not None
    hidden = model.mtp.hidden(output)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    for form in (Form.PREFILL, Form.DECODE):
        cache = model.mtp.new_cache(len(BLOCKS), 4)
        rows = attention_rows([Span(BLOCKS, 0, TOKENS, form)], 4, model.cos, model.sin)
        ours, theirs = hidden, expected
        for _ in range(3):  # drafts of drafts
            ours = model.mtp.forward(ours, tokens, rows, cache, experts)
            theirs, logits = stated.predict(theirs, tokens)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model.mtp.logits(ours), logits, atol=1e-4, rtol=1e-4)


def test_a_layer_that_is_not_whole_is_named(tmp_path: Path):
    make_checkpoint(tmp_path, mtp=True, change=lambda tensors: tensors.pop("model.layers.3.hnorm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.hnorm\.weight is missing"):
        Checkpoint.open(tmp_path).drafting("mtp")
