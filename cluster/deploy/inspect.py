"""`isotherm inspect`: what a checkpoint is and what a manifest would place where, from config,
index and headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest, kv_bytes_per_token
from isotherm.cluster.model.checkpoint import Checkpoint, shard_files
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.formats.base import WeightFormat
from isotherm.cluster.model.formats.registry import PLAIN, format_of, scale_suffixes
from isotherm.cluster.model.registry import load_config
from isotherm.cluster.model.tensors import Part, TensorSpec
from isotherm.cluster.placement.table import contiguous_placement
from isotherm.cluster.text.tokenizer_files import described
from isotherm.cluster.text.tool_formats.registry import chosen_format

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Report:
    path: str
    architecture: JSON
    parameters: dict[str, int]  # total, active per token, multi_token_prediction
    parameters_by_part: dict[str, int]
    bytes_by_part: dict[str, int]
    bytes_from: str  # headers, or an estimate from config.json
    files: int
    kv_bytes_per_token: int
    placement: list[JSON]

    def as_dict(self) -> JSON:
        return asdict(self)


def inspect_model(path: Path, manifest: Manifest) -> Report:
    """Raises ModelConfigError or CheckpointError. Weight files may be absent as a whole (only config.json and the index
    were fetched); then bytes are estimated."""
    config = load_config(path)
    parameters = {part: 0 for part in Part}
    for spec in config.tensors():
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
            parameters[Part.MTP] += sum(math.prod(s.shape) for s in config.mtp_tensors(layer))
        bytes_by_part, weights = _estimate(config, parameters, names)
        source = "estimate from config.json and the index: the weight files are not here"
    text = described(path)
    calls = chosen_format(manifest.tool_format, text.template)
    main = sum(n for part, n in parameters.items() if part is not Part.MTP)
    unused = (
        parameters[Part.ROUTED_EXPERTS]
        * (config.n_routed_experts - config.num_experts_per_tok)
        // config.n_routed_experts
    )
    return Report(
        path=str(path),
        architecture={
            **config.describe(),
            "weights": weights,
            "multi_token_prediction": "there, for `speculation`" if parameters[Part.MTP] else "none",
            "tokenizer": text.tokenizer,
            "chat_template": text.template_from,
            "tool_calls": "none that is known" if calls is None else calls.name,
            "not_supported": "; ".join((*config.not_supported, *text.not_supported)) or "nothing that is known of",
        },
        parameters={"total": main, "active": main - unused, "multi_token_prediction": parameters[Part.MTP]},
        parameters_by_part={part.value: n for part, n in parameters.items() if n},
        bytes_by_part={part.value: n for part, n in bytes_by_part.items()},
        bytes_from=source,
        files=len(files),
        kv_bytes_per_token=kv_bytes_per_token(config, manifest.dtype, manifest.engine.kv_cache_dtype),
        placement=_placement(config, bytes_by_part, manifest),
    )


def _counts(name: str) -> bool:
    """Whether a tensor of an MTP layer counts as parameters of it: scales do not, nor do the model's own
    embedding and head, stored again."""
    return not name.endswith((*scale_suffixes(), ".embed_tokens.weight", ".shared_head.head.weight"))


def _mtp_layers(names: Iterable[str], config: ModelConfig) -> list[int]:
    """Indices of the multi-token-prediction layers that the index names."""
    layers = {config.mtp_layer(name) for name in names}
    return sorted(layer for layer in layers if layer is not None)


def _estimate(c: ModelConfig, parameters: dict[Part, int], names: Mapping[str, str]) -> tuple[dict[Part, int], str]:
    """Bytes by part, and how the weights are stored. A projection that the index names is in the format of which it
    names the tensors; of one that it does not name, and of the width of all others, config.json is believed."""
    width = STORED_BYTES.get(c.stored_dtype, 2)
    sizes = {part: 0 for part in Part}
    words = c.stored_dtype

    def stored_form(spec: TensorSpec) -> WeightFormat:
        stored_as = format_of(spec.name, lambda name: "" if name in names else None, c.quantisation)
        if stored_as is PLAIN and spec.name not in names and spec.part is not Part.HEAD:
            return c.quantisation or PLAIN  # the published checkpoints leave the head in bf16
        return stored_as

    def add(spec: TensorSpec, part: Part) -> None:
        nonlocal words
        stored_as = stored_form(spec) if spec.quantisable else PLAIN
        if stored_as is PLAIN:
            sizes[part] += width * math.prod(spec.shape)
        else:
            words = stored_as.words()
            sizes[part] += stored_as.nbytes(spec.shape)

    for spec in c.tensors():
        add(spec, spec.part)
    if parameters[Part.MTP]:
        for spec in c.mtp_tensors(c.num_hidden_layers):
            add(spec, Part.MTP)
    return {part: n for part, n in sizes.items() if n}, words


def _placement(c: ModelConfig, sizes: dict[Part, int], manifest: Manifest) -> list[JSON]:
    own = sum(n for part, n in sizes.items() if part not in (Part.ROUTED_EXPERTS, Part.MTP))
    scheduler = manifest.scheduler_config(c)
    rows: list[JSON] = [
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
