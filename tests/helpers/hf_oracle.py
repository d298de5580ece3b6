"""What transformers' own classes say, in float32 with eager attention: the oracle that isotherm is compared with.

Reads checkpoints by its own code; nothing of isotherm's is used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepseek_checkpoints import dequantise, is_moe
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

# The classes of each model_type. Kimi's and JoyAI's own modeling files are DeepSeek-V3's under another name, and K2.5's
# text model is DeepSeek-V3's in transformers too.
CLASSES: dict[str, tuple[type, type]] = {
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
}
TEXT_MODEL = "language_model."  # before the names of K2.5's


def text_config(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((path / "config.json").read_text())
    return {**raw["text_config"], "model_type": raw["model_type"]} if "text_config" in raw else raw


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in float32, FP8 ones dequantised, the MTP layer's left out, and what is not of the
    text model."""
    raw: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        raw |= load_file(file)
    if any(name.startswith(TEXT_MODEL) for name in raw):
        raw = {name.removeprefix(TEXT_MODEL): t for name, t in raw.items() if name.startswith(TEXT_MODEL)}
    mtp = f"model.layers.{text_config(path)['num_hidden_layers']}."
    out = {}
    for name, tensor in raw.items():
        if name.startswith(mtp) or name.endswith("_scale_inv"):
            continue
        scale = raw.get(f"{name}_scale_inv")
        out[name] = tensor.float() if scale is None else dequantise(tensor, scale)
    return out


def pack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names and one tensor per expert → transformers' names, with a layer's experts stacked."""
    out, layers = {}, {}
    for name, tensor in tensors.items():
        prefix, found, rest = name.partition(".mlp.experts.")
        if not found:
            out[name] = tensor
            continue
        expert, part, _ = rest.split(".")
        layers.setdefault(prefix, {})[int(expert), part] = tensor
    for prefix, parts in layers.items():
        count = 1 + max(e for e, _ in parts)
        gate_up = [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(count)]
        out[f"{prefix}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{prefix}.mlp.experts.down_proj"] = torch.stack([parts[e, "down_proj"] for e in range(count)])
    return out


def hf_model(path: Path) -> PreTrainedModel:
    """The checkpoint at `path`. transformers ignores `moe_layer_freq`, so the layers that it makes dense are made dense
    here."""
    raw = text_config(path)
    config_class, model_class = CLASSES.get(raw["model_type"], (DeepseekV3Config, DeepseekV3ForCausalLM))
    left_out = ("quantization_config", "torch_dtype", "dtype", "model_type")
    fields = {k: v for k, v in raw.items() if k not in left_out}
    config = config_class(**fields | {"num_nextn_predict_layers": 0})
    config._attn_implementation = config._experts_implementation = "eager"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # no shared experts
        model = model_class(config).float().eval()
    for i, layer in enumerate(model.model.layers if model_class is DeepseekV3ForCausalLM else ()):
        if is_moe(raw, i) == isinstance(layer.mlp, DeepseekV3MLP):
            assert not is_moe(raw, i), f"transformers made layer {i} dense, moe_layer_freq cannot"
            layer.mlp = DeepseekV3MLP(config)
    weights = pack_experts(read_tensors(path))
    absent = [name for name in model.state_dict() if name not in weights]
    if raw["tie_word_embeddings"]:
        absent.remove("lm_head.weight")
    if not raw["n_shared_experts"]:
        absent = [name for name in absent if ".shared_experts." not in name]  # of width 0
    assert not absent, absent
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    unknown = set(weights) - set(model.state_dict())
    assert not unknown, unknown
    return model


class Oracle:
    """Log-probabilities and greedy continuations, with the margins by which they were decided."""

    def __init__(self, path: Path):
        self.model = hf_model(path)
        self.router_margin = float("inf")  # smallest so far between a chosen and a rejected expert or group
        self.index = _IndexWatch(text_config(path).get("index_topk"))
        for module in self.model.modules():
            if type(module).__name__.endswith("TopkRouter"):
                module.register_forward_hook(self._watch_router)

    @property
    def index_margin(self) -> float:
        """The smallest so far between a position that an indexer chose and one that it did not."""
        return self.index.margin

    def _watch_router(self, router: Any, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        score = outputs[0].float().sigmoid() + router.e_score_correction_bias
        groups = score.unflatten(-1, (router.num_group, -1))
        group_score = groups.topk(2, dim=-1).values.sum(-1).sort(-1, descending=True)
        if router.topk_group < router.num_group:
            values = group_score.values
            self._lower(values[:, router.topk_group - 1] - values[:, router.topk_group])
        chosen = groups.gather(
            1, group_score.indices[:, : router.topk_group, None].expand(-1, -1, groups.shape[-1])
        ).flatten(1)
        if router.top_k < chosen.shape[-1]:
            values = chosen.sort(-1, descending=True).values
            self._lower(values[:, router.top_k - 1] - values[:, router.top_k])

    def _lower(self, margins: Tensor) -> None:
        self.router_margin = min(self.router_margin, float(margins.min()))

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """float32 [len(tokens), V]: at each position, of the token that follows it."""
        with self.index:
            return self.model(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)

    @torch.inference_mode()
    def rounding(self, tokens: Sequence[int]) -> float:
        """By how much `logprobs` changes at most where the embedding is changed by half of its last bit: no two ways of
        computing them in float32 agree better."""
        weight, before = self.model.get_input_embeddings().weight, self.logprobs(tokens)
        stored = weight.clone()
        half_bits = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        weight *= 1 + half_bits * 2**-22
        change = float((self.logprobs(tokens) - before).abs().max())
        weight.copy_(stored)
        return change

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor, float]:
        """Tokens, their full log-probability rows [count, V], and the smallest lead of a chosen token over the next
        best."""
        tokens: list[int] = []
        rows, cache, new = [], None, list(prompt)
        for _ in range(count):
            with self.index:
                out = self.model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float().log_softmax(-1))
            new = [int(rows[-1].argmax())]
            tokens += new
        table = torch.stack(rows)
        best = table.topk(2, dim=-1).values
        return tokens, table, float((best[:, 0] - best[:, 1]).min())


class _IndexWatch(TorchFunctionMode):
    """Looks at every choice of `topk` positions, which are of an indexer alone: nothing else has so many."""

    def __init__(self, topk: int | None):
        super().__init__()
        self.topk, self.margin = topk, float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.topk and self.topk is not None and args[1] == self.topk < args[0].shape[-1]:
            best = func(args[0].float(), self.topk + 1, dim=-1).values
            gaps = (best[..., -2] - best[..., -1])[best[..., -1] > -1e30]  # of rows that see so many positions
            self.margin = min([self.margin, *gaps.flatten().tolist()])
        return func(*args, **kwargs)
