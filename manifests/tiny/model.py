"""The tiny model's network: DeepSeek-V3's published modelling, laid out for quick training on CPU. Knows nothing about
text or optimisers.

Shapes: B sequences, S positions, T = B·S tokens, H hidden, E experts, K experts a token, I expert width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from experts import Routed, by_expert
from fusion import fused
from torch import Tensor, nn

CONFIG = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=1280, hidden_size=256,
    num_hidden_layers=5, first_k_dense_replace=1, moe_layer_freq=1, intermediate_size=512, moe_intermediate_size=128,
    n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1, norm_topk_prob=True,
    routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc", num_attention_heads=8,
    num_key_value_heads=8, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    attention_bias=False, attention_dropout=0.0, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0,
    max_position_embeddings=4096,
    rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=1024, beta_fast=32, beta_slow=1,
                      mscale=1.0, mscale_all_dim=1.0),
    num_nextn_predict_layers=1, tie_word_embeddings=False, initializer_range=0.02, bos_token_id=0, eos_token_id=1,
    ep_size=1, pretraining_tp=1, use_cache=True, torch_dtype="bfloat16",
    quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                             weight_block_size=[128, 128]))  # fmt: skip
BLOCK, FP8_MAX = 128, 448.0


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., R, C] float32 to float8_e4m3fn of that shape and float32 scales [..., ceil(R/128), ceil(C/128)]; scale =
    absmax / 448 of each block."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = (blocks.abs().amax((-3, -1), keepdim=True) / FP8_MAX).clamp_min(1e-12)
    stored = (blocks / scale).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return stored.to(torch.float8_e4m3fn), scale.squeeze(-1).squeeze(-2)


def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantise`."""
    spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return stored.float() * spread[..., : stored.shape[-2], : stored.shape[-1]]


class Rounding:
    """Whether the forward pass sees weights as the checkpoint stores them; gradients pass straight through."""

    on = False

    @classmethod
    def fp8(cls, weight: Tensor) -> Tensor:
        return weight + (dequantise(*quantise(weight.detach())) - weight).detach() if cls.on else weight


class Projection(nn.Module):
    """A bias-free linear map stored in FP8. weight [out, in]."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * columns**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Rounding.fp8(self.weight))


def working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's where that is on: one cast spares one in each projection that reads x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


@fused
def normed(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """RMS norm in float32, → `dtype`."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * weight).to(dtype)


@fused
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.float()).to(gate.dtype) * up


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, working_dtype(x))


def yarn_frequencies() -> Tensor:
    """Rotary angles a position, [rope/2]: YaRN (arXiv 2309.00071, section 3.2) as DeepSeek's published modelling
    computes it."""
    width, theta, s = CONFIG["qk_rope_head_dim"], CONFIG["rope_theta"], CONFIG["rope_scaling"]
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)

    def dimension(rotations: float) -> float:
        return (
            width * math.log(s["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = max(math.floor(dimension(s["beta_fast"])), 0), min(math.ceil(dimension(s["beta_slow"])), width - 1)
    ramp = ((torch.arange(width // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / s["factor"] * ramp + plain * (1 - ramp)


def softmax_scale() -> float:
    s = CONFIG["rope_scaling"]
    mscale = 0.1 * s["mscale_all_dim"] * math.log(s["factor"]) + 1.0
    return (CONFIG["qk_nope_head_dim"] + CONFIG["qk_rope_head_dim"]) ** -0.5 * mscale * mscale


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Interleaved RoPE. x [..., S, rope], angles [S, rope/2]."""
    (even, odd), cos, sin = x.float().unflatten(-1, (-1, 2)).unbind(-1), angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


@fused
def queries_and_keys(q: Tensor, k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, heads, S, nope + rope], k_nope [B, heads, S, nope] and k_rope [B, S, rope], which all heads share → q and k
    [B, heads, S, nope + rope], rotated."""
    nope, rope = k_nope.shape[-1], k_rope.shape[-1]
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], angles)), -1)
    k_rope = rotate(k_rope[:, None], angles).expand(-1, q.shape[1], -1, rope)
    return q, torch.cat((k_nope, k_rope), -1)


class KeysAndValues(NamedTuple):
    """Of one pass, [B, heads, S, nope + rope] and [B, heads, S, v]."""

    k: Tensor
    v: Tensor

    def later(self, positions: int) -> KeysAndValues:
        """At each position those of so many positions before; the first ones' are void."""
        return KeysAndValues(self.k.roll(positions, 2), self.v.roll(positions, 2))


class Attention(nn.Module):
    """Multi-head latent attention, in its expanded form. x [B, S, H]; mask [B, S, S] is added to the scores, None
    stands for causal."""

    def __init__(self) -> None:
        super().__init__()
        c, self.heads = CONFIG, CONFIG["num_attention_heads"]
        self.nope, self.rope, self.v, self.latent = (
            c["qk_nope_head_dim"],
            c["qk_rope_head_dim"],
            c["v_head_dim"],
            c["kv_lora_rank"],
        )
        self.q_a_proj = Projection(c["hidden_size"], c["q_lora_rank"])
        self.q_a_layernorm = Norm(c["q_lora_rank"])
        self.q_b_proj = Projection(c["q_lora_rank"], self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Projection(c["hidden_size"], self.latent + self.rope)
        self.kv_a_layernorm = Norm(self.latent)
        self.kv_b_proj = Projection(self.latent, self.heads * (self.nope + self.v))
        self.o_proj = Projection(self.heads * self.v, c["hidden_size"])

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None, passes: list[KeysAndValues] | None = None
    ) -> Tensor:
        """`passes`: of the passes before this one over the same positions, each of which began a position later than
        the one before; this one's come to them."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v], -1)
        q, k = queries_and_keys(q, k_nope, k_rope, angles)
        if passes is not None:
            passes.append(KeysAndValues(k, v))
        if passes is not None and len(passes) > 1:
            assert mask is not None
            with torch.autocast(x.device.type, enabled=False):
                out = self._after(passes, q * softmax_scale(), mask.to(q.dtype))
        elif mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale())
        else:  # written out: on CPU half the time of the fused one at these lengths
            with torch.autocast(x.device.type, enabled=False):
                mask = mask.to(q.dtype).repeat_interleave(self.heads, 0)
                scores = torch.baddbmm(mask, (q * softmax_scale()).flatten(0, 1), k.flatten(0, 1).mT)
                out = (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    @staticmethod
    def _after(passes: list[KeysAndValues], q: Tensor, mask: Tensor) -> Tensor:
        """What the last of several passes reads: of the positions that it guesses from, what the passes that guessed
        them had; before them, the first pass's."""
        (first, *guessed), late = passes, len(passes) - 1
        guessed = [one.later(late - i) for i, one in enumerate(guessed, 1)]
        mask = mask.roll(late, 1).repeat_interleave(q.shape[1], 0)
        scores = torch.baddbmm(mask, q.flatten(0, 1), first.k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        own = torch.stack([(q * one.k).sum(-1) for one in guessed], -1)
        shares = torch.cat((scores, own), -1).softmax(-1)
        length = scores.shape[-1]
        out = shares[..., :length] @ first.v
        for i, one in enumerate(guessed, length):
            out = out + shares[..., i, None] * one.v
        return out


class MLP(nn.Module):
    def __init__(self, inner: int):
        super().__init__()
        hidden = CONFIG["hidden_size"]
        self.gate_proj, self.up_proj, self.down_proj = (
            Projection(hidden, inner),
            Projection(hidden, inner),
            Projection(inner, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Sigmoid scores, biased choice within the best groups. weight [E, H]; e_score_correction_bias [E] moves the
    choice, never the weights."""

    def __init__(self) -> None:
        super().__init__()
        experts = CONFIG["n_routed_experts"]
        self.weight = nn.Parameter(torch.randn(experts, CONFIG["hidden_size"]) * CONFIG["hidden_size"] ** -0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] to expert ids [T, K] and their weights [T, K]."""
        with torch.autocast(x.device.type, enabled=False):  # a rounded score could choose another expert
            scores = F.linear(x.float(), self.weight).sigmoid()
        biased = (scores.detach() + self.e_score_correction_bias).unflatten(1, (CONFIG["n_group"], -1))
        kept = biased.topk(2, -1).values.sum(-1).topk(CONFIG["topk_group"], -1).indices
        mask = torch.zeros_like(biased[..., 0], dtype=torch.bool).scatter_(1, kept, True)
        ids = biased.masked_fill(~mask[..., None], -math.inf).flatten(1).topk(CONFIG["num_experts_per_tok"], -1).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * CONFIG["routed_scaling_factor"]


class MoE(nn.Module):
    """Routed experts as stacked matrices: gate_up [E, 2, I, H], down [E, H, I]."""

    def __init__(self) -> None:
        super().__init__()
        hidden, inner, experts = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["n_routed_experts"]
        self.gate = Router()
        self.gate_up = nn.Parameter(torch.randn(experts, 2, inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5 * 0.3)
        self.shared_experts = MLP(inner * CONFIG["n_shared_experts"])
        self.load = torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, -2)
        ids, weights = self.gate(x)
        order, load = by_expert(ids, CONFIG["n_routed_experts"])
        self.load = load.float()
        gate_up, down = Rounding.fp8(self.gate_up).flatten(1, 2), Rounding.fp8(self.down)
        return (Routed.apply(x, weights, gate_up, down, order) + self.shared_experts(x)).view(shape)


class Layer(nn.Module):
    def __init__(self, dense: bool):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(CONFIG["hidden_size"]), Norm(CONFIG["hidden_size"])
        self.self_attn = Attention()
        self.mlp = MLP(CONFIG["intermediate_size"]) if dense else MoE()

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None, passes: list[KeysAndValues] | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, passes)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTP(Layer):
    """The prediction layer: from the main model's normed hidden state at t and the embedding of token t+1 to logits for
    t+2. Applied again, as it is for each guess of several, it takes what it gave at t-1 in the place of the main
    model's."""

    def __init__(self) -> None:
        super().__init__(dense=False)
        hidden = CONFIG["hidden_size"]
        self.enorm, self.hnorm = Norm(hidden), Norm(hidden)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": Norm(hidden)})

    def predict(
        self, hidden: Tensor, embedded: Tensor, angles: Tensor, mask: Tensor | None, count: int
    ) -> list[Tensor]:
        """hidden, embedded [B, S, H] to the head's input [B, S, H] of each of so many passes, given that the tokens
        guessed before were right. Pass n is void at the first n-1 positions of a document, whose guess would have begun
        in the one before. Without a mask there is one pass."""
        embedded, passes, out, load = self.enorm(embedded), list[KeysAndValues](), list[Tensor](), torch.zeros(())
        for _ in range(count if mask is not None else 1):
            x = self.eh_proj(torch.cat((embedded, self.hnorm(hidden)), -1))
            out.append(self.shared_head["norm"](self(x, angles, mask, passes)))
            hidden, load = out[-1].roll(1, 1), load + self.mlp.load
        self.mlp.load = load
        return out


def document_mask(tokens: Tensor) -> Tensor:
    """tokens [B, S] to an additive mask [B, S, S]: each position sees its own document, from the last `BOS` on, up to
    itself."""
    document = (tokens == CONFIG["bos_token_id"]).cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    return torch.zeros(seen.shape, device=tokens.device).masked_fill_(~seen, -math.inf)


class Model(nn.Module):
    """tokens [B, S] to logits for t+1 [B, S, V] and, of each of so many passes of the MTP layer as are asked for, for
    t+2 [B, S, V] (the last position's is void; of passes after the first, more is: see MTP.predict).

    Documents packed in a row see only themselves, unless the row is `one_context`.
    """

    def __init__(self) -> None:
        super().__init__()
        vocab, hidden, layers = CONFIG["vocab_size"], CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
        self.embed_tokens = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList([*(Layer(dense=i < CONFIG["first_k_dense_replace"]) for i in range(layers)), MTP()])
        self.norm = Norm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.register_buffer("frequencies", yarn_frequencies(), persistent=False)

    def forward(self, tokens: Tensor, passes: int = 0, one_context: bool = False) -> tuple[Tensor, list[Tensor]]:
        embedded = self.embed_tokens(tokens)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequencies
        mask = None if one_context else document_mask(tokens)
        x = embedded
        for layer in self.layers[:-1]:
            x = layer(x, angles, mask)
        x = self.norm(x)
        ahead = self.layers[-1].predict(x, embedded.roll(-1, 1), angles, mask, passes) if passes else []
        return self.lm_head(x), [self.lm_head(hidden) for hidden in ahead]

    def moe(self) -> list[MoE]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]
