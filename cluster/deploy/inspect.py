"""`isotherm inspect`: what a checkpoint is and what a manifest would place where, from config, index and headers
alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest, kv_bytes_per_token
from isotherm.cluster.model.checkpoint import Checkpoint, NoWeightFilesError, shard_files
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.conversion import kept_bytes
from isotherm.cluster.model.formats.base import WeightFormat
from isotherm.cluster.model.formats.registry import PLAIN, format_of
from isotherm.cluster.model.registry import load_config
from isotherm.cluster.model.tensors import Part, TensorSpec
from isotherm.cluster.model.weight_choice import WeightChoice
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
    kv_bytes_per_token: int  # of the layer that drafts too, where one does
    kept: str  # in how many bits weights are kept where they are served: "stored", or what is quantised
    placement: list[JSON]

    def as_dict(self) -> JSON:
        return asdict(self)


def inspect_model(path: Path, manifest: Manifest, choice: WeightChoice | None = None) -> Report:
    """`choice` stands in for the manifest's `weights`. Raises ModelConfigError or CheckpointError. Where weight files
    are absent (only config.json and the index, if there is one, were fetched), bytes are estimated."""
    config, choice = load_config(path), choice or manifest.weights.choice
    parameters = {part: 0 for part in Part}
    for spec in config.tensors():
        parameters[spec.part] += math.prod(spec.shape)
    files, names = _named(path)
    absent = sum(not file.exists() for file in files)
    if files and not absent:
        checkpoint = Checkpoint.open(path)
        parameters[Part.MTP] = sum(math.prod(spec.shape) for spec in checkpoint.mtp_weights())
        stored: _Stored = _InFiles(checkpoint)
        served = checkpoint.drafting(manifest.speculation.kind)[0].config
        bytes_by_part, source, weights = checkpoint.nbytes_by_part(), "safetensors headers", checkpoint.weight_format()
    else:
        for layer in (mtp_layers := _mtp_layers(names, config)):
            parameters[Part.MTP] += sum(math.prod(s.shape) for s in config.mtp_tensors(layer))
        stored = estimated = _Estimated(config, names)
        drafts = manifest.speculation.kind in ("auto", "mtp") and config.num_hidden_layers in mtp_layers
        served = replace(config, drafting_layers=int(drafts))
        bytes_by_part, weights = estimated.by_part(bool(mtp_layers))
        source = _estimated_from(len(files), absent)
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
            "multi_token_prediction": _mtp_words(served, parameters[Part.MTP]) if files else "not known",
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
        kv_bytes_per_token=kv_bytes_per_token(served, manifest.dtype, manifest.engine.kv_cache_dtype),
        kept=choice.words,
        placement=_placement(served, manifest, choice, stored),
    )


def _named(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files that are here or that the index names, and its map, empty where there is no index."""
    try:
        files, weight_map = shard_files(path)
    except NoWeightFilesError:  # one file and no index: of a hub's repository, config.json alone was fetched
        return [], {}
    return files, weight_map or {}


def _estimated_from(files: int, absent: int) -> str:
    if not files:
        return "estimate from config.json: neither weight files nor an index are here"
    which = "the" if absent == files else f"{absent} of {files}"
    return f"estimate from config.json and the index: {which} weight files are not here"


def _mtp_words(served: ModelConfig, parameters: int) -> str:
    return "there, and drafts" if served.drafting_layers else "there, for `speculation`" if parameters else "none"


def _mtp_layers(names: Iterable[str], config: ModelConfig) -> list[int]:
    """Indices of the multi-token-prediction layers that the index names."""
    layers = {config.mtp_layer(name) for name in names}
    return sorted(layer for layer in layers if layer is not None)


class _Stored(Protocol):
    """How the checkpoint has a tensor."""

    def form(self, spec: TensorSpec) -> WeightFormat: ...

    def nbytes(self, spec: TensorSpec) -> int: ...


class _InFiles:
    """As headers say."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def form(self, spec: TensorSpec) -> WeightFormat:
        return self._checkpoint.format_of(spec.name) if spec.quantisable else PLAIN

    def nbytes(self, spec: TensorSpec) -> int:
        return sum(info.nbytes for info in self._checkpoint.tensors_of(spec.name, spec.quantisable).values())


class _Estimated:
    """Where no file is there. A projection that the index names is in the format of which it names the tensors; of one
    that it does not name, and of the width of all others, config.json is believed."""

    def __init__(self, config: ModelConfig, names: Mapping[str, str]) -> None:
        self._config, self._names = config, names
        self._width = STORED_BYTES.get(config.stored_dtype, 2)

    def form(self, spec: TensorSpec) -> WeightFormat:
        if not spec.quantisable:
            return PLAIN
        c, names = self._config, self._names
        stored_as = format_of(spec.name, lambda name: "" if name in names else None, c.quantisation)
        if stored_as is PLAIN and spec.name not in names and spec.part is not Part.HEAD:
            return c.quantisation or PLAIN  # the published checkpoints leave the head in bf16
        return stored_as

    def nbytes(self, spec: TensorSpec) -> int:
        stored_as = self.form(spec)
        return self._width * math.prod(spec.shape) if stored_as is PLAIN else stored_as.nbytes(spec.shape)

    def by_part(self, mtp: bool) -> tuple[dict[Part, int], str]:
        """Bytes, with one layer for multi-token prediction or without, and how the weights are stored."""
        sizes = dict.fromkeys(Part, 0)
        words = self._config.stored_dtype
        for spec in self._config.tensors():
            sizes[spec.part] += self.nbytes(spec)
            if (stored_as := self.form(spec)) is not PLAIN:
                words = stored_as.words()
        if mtp:
            sizes[Part.MTP] = sum(map(self.nbytes, self._config.mtp_tensors(self._config.num_hidden_layers)))
        return {part: n for part, n in sizes.items() if n}, words


def _placement(c: ModelConfig, manifest: Manifest, choice: WeightChoice, stored: _Stored) -> list[JSON]:
    own = routed = 0
    layer = c.kept_draft_layer
    both = set() if layer is None else {p for e in range(c.n_routed_experts) for p in c.expert_projections(layer, e)}
    for spec in c.loaded_tensors():
        size = kept_bytes(spec, choice, stored.form(spec), stored.nbytes(spec))
        if spec.part is not Part.ROUTED_EXPERTS or spec.name in both:
            own += size
        if spec.part is Part.ROUTED_EXPERTS:
            routed += size
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
        each = routed // (len(c.moe_layers) * c.n_routed_experts)
        for group in groups:
            experts = len(placement.held_by(group))
            rows.append({"worker": group, "weight_bytes": experts * each, "experts": experts})
    return rows
