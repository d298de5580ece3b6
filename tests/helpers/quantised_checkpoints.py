"""Checkpoints as quantisers publish them, each beside one with the numbers that it stands for.

compressed-tensors' layouts are packed and unpacked by that library itself. GPTQ's and Quark's are stated here anew,
nibble by nibble, for their libraries need a GPU or more than a test should install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from deepseek_checkpoints import make_config, make_tensors, write_checkpoint
from torch import Tensor

from isotherm.cluster.model.registry import parse

# Inputs of every projection are whole groups of 32 and of 64, and outputs whole int32 words.
SHAPE = {
    "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

Parts = tuple[dict[str, Tensor], Tensor]  # name within the module → tensor; and the numbers that they stand for


def affine(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, K / group]: code = round(weight / scale) + zero, 0 … 15."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        return torch.maximum(-low, high) / 7, torch.full(low.shape, 8, dtype=torch.int32)
    scale = (high - low).clamp(min=1e-6) / 15
    return scale, (-low / scale).round().clamp(1, 15).int()


def compressed(weight: Tensor, group: int = 32, symmetric: bool = True) -> Parts:
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale, zero = affine(weight, group, symmetric)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": (zero - 8).to(torch.int8)}
    parts = PackedQuantizationCompressor.compress(state, scheme)
    return parts, PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]


def compressed_loosely(weight: Tensor, group: int = 32) -> Parts:
    """With zero points as they were stored before compressed-tensors' pull request 296: one by one, signed."""
    parts, numbers = compressed(weight, group, False)
    return parts | {"weight_zero_point": (affine(weight, group, False)[1] - 8).to(torch.int8)}, numbers


def mxfp4(weight: Tensor) -> Parts:
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    largest = weight.view(len(weight), -1, 32).abs().amax(-1)
    scale = torch.exp2((largest / 6).log2().ceil())
    state = {"weight": weight, "weight_scale": scale}
    parts = MXFP4PackedCompressor.compress(state, scheme)
    return parts, MXFP4PackedCompressor.decompress(dict(parts), scheme)["weight"].float()


def quark(weight: Tensor) -> Parts:
    parts, numbers = mxfp4(weight)
    return {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}, numbers


def gptq(weight: Tensor, group: int = 32, symmetric: bool = True, less: int = 1) -> Parts:
    """`less`: what zero points are stored less by."""
    scale, zero = affine(weight, group, symmetric)
    scale = scale.half().float()
    spread = scale.repeat_interleave(group, 1), zero.repeat_interleave(group, 1)
    codes = ((weight / spread[0]).round() + spread[1]).clamp(0, 15).int()
    parts = {
        "qweight": words(codes).T.contiguous(),
        "qzeros": words((zero - less).T.contiguous()),
        "scales": scale.T.half().contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
    }
    return parts, (codes - spread[1]) * spread[0]


def words(codes: Tensor) -> Tensor:
    """[R, C] → int32 [R, C / 8]: of eight codes the first in the lowest bits."""
    rows = []
    for row in codes.tolist():
        packed = [sum(code << 4 * i for i, code in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def compressed_config(group: int = 32, symmetric: bool = True, **changes: Any) -> dict[str, Any]:
    """As Kimi K2 Thinking has it."""
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric,
        "dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None,
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | changes, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
        "ignore": ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "quantization_status": "compressed",
    }  # fmt: skip


MXFP4_CONFIG = compressed_config() | {
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}
    },
}
QUARK_CONFIG = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": {"dtype": "fp4", "group_size": 32, "qscheme": "per_group", "scale_format": "e8m0"}
    },
    "exclude": ["lm_head"],
}


def gptq_config(group: int = 32, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False} | changes


AUTO_ROUND_CONFIG = {
    "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}  # fmt: skip

# Name → what is done to a weight, and what config.json says of it.
PUBLISHED: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any]]] = {
    "pack-quantized": (compressed, compressed_config()),
    "pack-quantized-asymmetric": (lambda w: compressed(w, 64, False), compressed_config(64, False)),
    "pack-quantized-loose-zeros": (lambda w: compressed_loosely(w, 64), compressed_config(64, False)),
    "gptq": (gptq, gptq_config()),
    "gptq-asymmetric": (lambda w: gptq(w, 64, False), gptq_config(64, sym=False)),
    "gptq-v2": (lambda w: gptq(w, 32, False, less=0), gptq_config(sym=False, checkpoint_format="gptq_v2")),
    "auto-round": (gptq, AUTO_ROUND_CONFIG),
    "mxfp4": (mxfp4, MXFP4_CONFIG),
    "quark": (quark, QUARK_CONFIG),
}


def written(path: Path, kind: str, shards: int = 2, all_of: bool = True, mtp: bool = False) -> tuple[Path, Path]:
    """Two checkpoints of one model: quantised, but for the head, and with the numbers that it stands for. `all_of`:
    every projection, or the routed experts alone. `mtp`: with a layer for multi-token prediction."""
    quantise, said = PUBLISHED[kind]
    config = make_config(SHAPE, mtp=mtp)
    numbers = make_tensors(config, 3)
    stored, parsed = dict(numbers), parse(config)
    for spec in [*parsed.tensors(), *(parsed.mtp_tensors(parsed.num_hidden_layers) if mtp else ())]:
        if spec.quantisable and spec.name != "lm_head.weight" and (all_of or ".experts." in spec.name):
            parts, numbers[spec.name] = quantise(stored.pop(spec.name).float())
            stored |= {f"{spec.name.removesuffix('weight')}{leaf}": tensor for leaf, tensor in parts.items()}
    narrow = write_checkpoint(path / kind, config | {"quantization_config": said}, stored, shards=shards)
    return narrow, write_checkpoint(path / f"{kind}-numbers", config, numbers)
