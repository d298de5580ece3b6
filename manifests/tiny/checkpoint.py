"""The trained model in the hub's layout: tensors under DeepSeek's published names, and the files beside them."""

from __future__ import annotations

import json
import pathlib

import torch
from dialogue import BOS, CHAT_TEMPLATE, EOS, PAD
from model import CONFIG, Model, Projection, dequantise, quantise
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


def checkpoint(model: Model) -> dict[str, Tensor]:
    """The model's tensors under DeepSeek's published names and types; embedding and head are shared with the MTP layer
    and stored once."""
    tensors: dict[str, Tensor] = {}

    def projection(name: str, weight: Tensor) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = (t.contiguous() for t in quantise(weight))

    for name, value in model.state_dict().items():
        prefix, leaf = name.rsplit(".", 1)
        full = name if prefix == "lm_head" else f"model.{name}"
        if leaf in ("gate_up", "down"):
            parts = ("gate_proj", "up_proj") if leaf == "gate_up" else ("down_proj",)
            for e, expert in enumerate(value.view(value.shape[0], len(parts), *value.shape[-2:])):
                for part, weight in zip(parts, expert, strict=True):
                    projection(f"model.{prefix}.experts.{e}.{part}", weight)
        elif isinstance(model.get_submodule(prefix), Projection):
            projection(f"model.{prefix}", value)
        else:
            tensors[full] = value.clone() if leaf == "e_score_correction_bias" else value.to(torch.bfloat16)
    return tensors


def restore(tensors: dict[str, Tensor]) -> Model:
    """A float32 model holding just what `checkpoint` stored."""

    def read(name: str) -> Tensor:
        scale = tensors.get(f"{name}_scale_inv")
        return tensors[name].float() if scale is None else dequantise(tensors[name], scale)

    model, state = Model(), {}
    for name in model.state_dict():
        prefix, leaf = name.rsplit(".", 1)
        stored = name if prefix == "lm_head" else f"model.{name}"
        experts = [f"model.{prefix}.experts.{e}" for e in range(CONFIG["n_routed_experts"])]
        if leaf == "gate_up":
            state[name] = torch.stack(
                [torch.stack([read(f"{e}.gate_proj.weight"), read(f"{e}.up_proj.weight")]) for e in experts]
            )
        elif leaf == "down":
            state[name] = torch.stack([read(f"{e}.down_proj.weight") for e in experts])
        else:
            state[name] = read(stored)
    model.load_state_dict(state)
    return model.eval()


def write(out: pathlib.Path, model: Model, tokenizer: Tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint(model), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id")}
    files = {
        "config.json": CONFIG,
        "generation_config.json": dict(ids, do_sample=False),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=BOS,
            eos_token=EOS,
            pad_token=PAD,
            unk_token=None,
            add_bos_token=True,
            add_eos_token=False,
            clean_up_tokenization_spaces=False,
            model_max_length=CONFIG["max_position_embeddings"],
            chat_template=CHAT_TEMPLATE,
        ),
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
