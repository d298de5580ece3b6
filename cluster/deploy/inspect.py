"""`isotherm inspect`: what a checkpoint is and what a manifest would place where, from config,
index and headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isotherm.cluster.manifest import Manifest, kv_bytes_per_token
from isotherm.cluster.model.checkpoint import BLOCK, FP8_WORDS, SCALE_SUFFIX, Checkpoint, layer_of, shard_files
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.tensors import Part, TensorSpec, expected_tensors, layer_tensors
from isotherm.cluster.placement.table import contiguous_placement

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Report:
    path: str
    architecture: dict[str, Any]
    parameters: dict[str, int]  # total, active per token, multi_token_prediction
    parameters_by_part: dict[str, int]
    bytes_by_part: dict[str, int]
    bytes_from: str  # headers, or an estimate from config.json
    files: int
    kv_bytes_per_token: int
    placement: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(path: Path, manifest: Manifest) -> Report:
    """Raises ModelConfigError or CheckpointError. Weight files may be absent as a whole (only config.json and the index
    were fetched); then bytes are estimated."""
    config = ModelConfig.load(path)
    parameters = {part: 0 for part in Part}
    for spec in expected_tensors(config):
        parameters[spec.part] += math.prod(spec.shape)
    files, weight_map = shard_files(path)
    if any(file.exists() for file in files):
        checkpoint = Checkpoint.open(path)
        mtp = [checkpoint.tensors[name] for name in checkpoint.mtp_tensors() if _counts(name)]
        parameters[Part.MTP] = sum(math.prod(info.shape) for info in mtp)
        bytes_by_part, source, weights = checkpoint.nbytes_by_part(), "safetensors headers", checkpoint.weight_format()
    else:
        names = weight_map or {}  # where no file is there, the index has named them
        for layer in _mtp_layers(names, config):
            # It has enorm, hnorm, shared_head.norm, and eh_proj from twice the hidden size too.
            extra = 3 * config.hidden_size + 2 * config.hidden_size**2
            parameters[Part.MTP] += sum(math.prod(s.shape) for s in layer_tensors(config, layer)) + extra
        bytes_by_part, weights = _estimate(config, parameters, names)
        source = "estimate from config.json and the index: the weight files are not here"
    main = sum(n for part, n in parameters.items() if part is not Part.MTP)
    unused = (
        parameters[Part.ROUTED_EXPERTS]
        * (config.n_routed_experts - config.num_experts_per_tok)
        // config.n_routed_experts
    )
    return Report(
        path=str(path),
        architecture=_architecture(config, weights, parameters[Part.MTP] > 0),
        parameters={"total": main, "active": main - unused, "multi_token_prediction": parameters[Part.MTP]},
        parameters_by_part={part.value: n for part, n in parameters.items() if n},
        bytes_by_part={part.value: n for part, n in bytes_by_part.items()},
        bytes_from=source,
        files=len(files),
        kv_bytes_per_token=kv_bytes_per_token(config, manifest.dtype),
        placement=_placement(config, bytes_by_part, manifest),
    )


def _counts(name: str) -> bool:
    """Whether a tensor of an MTP layer counts as parameters of it: block scales do not, nor do the model's own
    embedding and head, stored again."""
    return not name.endswith((SCALE_SUFFIX, ".embed_tokens.weight", ".shared_head.head.weight"))


def _mtp_layers(names: Iterable[str], config: ModelConfig) -> list[int]:
    """Indices of the multi-token-prediction layers that the index names."""
    layers = {layer_of(name) for name in names}
    return sorted(layer for layer in layers if layer is not None and layer >= config.num_hidden_layers)


def _architecture(c: ModelConfig, weights: str, mtp: bool) -> dict[str, Any]:
    return {
        "layers": c.num_hidden_layers,
        "dense_layers": c.num_hidden_layers - len(c.moe_layers),
        "moe_layers": len(c.moe_layers),
        "hidden_size": c.hidden_size,
        "attention_heads": c.num_attention_heads,
        "q_lora_rank": c.q_lora_rank,
        "kv_lora_rank": c.kv_lora_rank,
        "head_dims": f"{c.qk_nope_head_dim} nope + {c.qk_rope_head_dim} rope, value {c.v_head_dim}",
        "routed_experts": (
            f"{c.num_experts_per_tok} of {c.n_routed_experts}, {c.topk_group} of {c.n_group} router groups"
        ),
        "shared_experts": c.n_shared_experts,
        "vocabulary": c.vocab_size,
        "context": c.max_position_embeddings,
        "rope": "plain"
        if c.rope.yarn_factor is None
        else f"YaRN ×{c.rope.yarn_factor:g} from {c.rope.original_max_position}",
        "weights": weights,
        "multi_token_prediction": "recognised, not used yet" if mtp else "none",
    }


def _estimate(c: ModelConfig, parameters: dict[Part, int], names: Mapping[str, str]) -> tuple[dict[Part, int], str]:
    """Bytes by part, and how the weights are stored. A projection that the index names is FP8 where it names its
    scales; of one that it does not name, and of the width of all others, config.json is believed."""
    width = STORED_BYTES.get(c.stored_dtype, 2)
    sizes = {part: 0 for part in Part}
    quantised = 0

    def is_fp8(spec: TensorSpec) -> bool:
        if spec.name in names:
            return spec.name + SCALE_SUFFIX in names
        return c.fp8 and spec.part is not Part.HEAD  # the published checkpoints leave the head in bf16

    def add(spec: TensorSpec, part: Part) -> None:
        nonlocal quantised
        count = math.prod(spec.shape)
        if spec.quantisable and is_fp8(spec):
            quantised += 1
            sizes[part] += count + 4 * math.prod(-(-n // BLOCK) for n in spec.shape)
        else:
            sizes[part] += width * count

    for spec in expected_tensors(c):
        add(spec, spec.part)
    if parameters[Part.MTP]:
        for spec in layer_tensors(c, c.num_hidden_layers):
            add(spec, Part.MTP)
        sizes[Part.MTP] += width * 2 * c.hidden_size**2
    return {part: n for part, n in sizes.items() if n}, FP8_WORDS if quantised else c.stored_dtype


def _placement(c: ModelConfig, sizes: dict[Part, int], manifest: Manifest) -> list[dict[str, Any]]:
    own = sum(n for part, n in sizes.items() if part not in (Part.ROUTED_EXPERTS, Part.MTP))
    scheduler = manifest.scheduler_config(c)
    rows: list[dict[str, Any]] = [
        {
            "worker": f"attention-{i}",
            "weight_bytes": own,
            "kv_bytes": manifest.engine.kv_memory,
            "kv_tokens": scheduler.blocks * scheduler.block_size,
        }
        for i in range(manifest.attention.shards)
    ]
    if c.moe_layers:
        groups = [f"expert-{i}" for i in range(manifest.experts.groups)]
        placement = contiguous_placement(c.moe_layers, c.n_routed_experts, groups)
        each = sizes.get(Part.ROUTED_EXPERTS, 0) // (len(c.moe_layers) * c.n_routed_experts)
        for group in groups:
            experts = len(placement.held_by(group))
            rows.append({"worker": group, "weight_bytes": experts * each, "experts": experts})
    return rows
