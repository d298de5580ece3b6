"""`isotherm inspect --quality`: what quantising loses: the error of each layer's weights, and the perplexity of a text,
both beside the checkpoint as it is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from isotherm.actors.local import local_engine, run
from isotherm.actors.models.weights import WeightReader, parse_dtype
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.tensors import Part
from isotherm.cluster.model.weight_choice import STORED, WeightChoice
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.kernels.ops import Kernels
from isotherm.kernels.select import select_kernels

WINDOW = 512  # tokens of the text that are predicted with nothing before them but each other


class QualityError(IsothermError, ValueError):
    """There is nothing to be measured; says what is missing."""


def measure_quality(
    manifest: Manifest,
    path: Path,
    choice: WeightChoice,
    kept: KvCacheDtype,
    text: Path | None,
    note: Callable[[str], None],
) -> JSON:
    """`layers`: of each layer the relative error of its experts and of its dense weights; `perplexity`: stored, and as
    chosen, with the KV cache in `kept`. Reads every weight twice. Raises QualityError, CheckpointError or
    TokenizerError."""
    if choice.is_stored and kept == "auto":
        raise QualityError(
            "nothing is quantised; give --experts int4, --dense fp8|int4, --head fp8|int8|int6|int4 or "
            "--kv-cache-dtype fp8"
        )
    checkpoint = Checkpoint.open(path)
    tokens = Tokenizer.load(path).encode(own_text() if text is None else _text_of(text))
    if len(tokens) < 2:
        raise QualityError(f"{text} has {len(tokens)} token(s); perplexity needs at least 2")
    note("reading the weights")
    layers = layer_errors(checkpoint, choice)
    selection = select_kernels(manifest.kernels, parse_dtype(manifest.dtype), device=manifest.device, isa=manifest.isa)
    note(f"kernels: {selection.reason}")
    found = {}
    sides: list[tuple[str, WeightChoice, KvCacheDtype]] = [("stored", WeightChoice(), "auto"), ("chosen", choice, kept)]
    for name, one, cache in sides:
        note(f"computing {len(tokens)} tokens, {_words(one, cache)}")
        found[name] = perplexity(checkpoint, selection.kernels, one, cache, tokens)
    return {"weights": choice.words, "kv_cache": kept, "layers": layers, "tokens": len(tokens), "perplexity": found}


def _words(choice: WeightChoice, kept: KvCacheDtype) -> str:
    return f"weights as {choice.words}" + ("" if kept == "auto" else f", KV cache as {kept}")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QualityError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def own_text() -> str:
    """What perplexity is of where no text is given: prose that the bundled model has learnt from, in plain English."""
    texts = json.loads((bundled_model() / "texts.json").read_text(encoding="utf-8"))
    return "\n".join([*texts["prose"], *texts["about"].values()])


def layer_errors(checkpoint: Checkpoint, choice: WeightChoice) -> list[JSON]:
    """Relative error, √(Σ(quantised - stored)² / Σ stored²), over all weights of a layer that are quantised."""
    sums: dict[str, dict[str, list[float]]] = {}
    weights = [s for s in checkpoint.config.tensors() if choice.form(s) != STORED]
    names = [spec.name for spec in weights]
    with WeightReader(checkpoint) as stored, WeightReader(checkpoint, choice) as chosen, chosen.ahead(names):
        for spec in weights:
            before = stored.stored(spec.name).dequantise(torch.float32)
            lost = chosen.stored(spec.name).dequantise(torch.float32) - before
            part = {Part.ROUTED_EXPERTS: "experts", Part.HEAD: "head"}.get(spec.part, "dense")
            place = sums.setdefault(layer_of(spec.name), {}).setdefault(part, [0.0, 0.0])
            place[0] += float(lost.double().square().sum())
            place[1] += float(before.double().square().sum())
    return [
        {"layer": layer, **{part: math.sqrt(lost / (of or 1.0)) for part, (lost, of) in parts.items()}}
        for layer, parts in sums.items()
    ]


def layer_of(weight: str) -> str:
    """The number in a weight's name that says its layer, or the name of what is in none."""
    numbers = [word for word in weight.split(".") if word.isdecimal()]
    return numbers[0] if numbers else weight.removesuffix(".weight")


def perplexity(
    checkpoint: Checkpoint, kernels: Kernels, choice: WeightChoice, kept: KvCacheDtype, tokens: Sequence[int]
) -> float:
    """e to the mean of -log p of each token but the first of a window."""
    window = min(WINDOW, checkpoint.config.max_position_embeddings - 1)
    windows = [tuple(tokens[at : at + window]) for at in range(0, len(tokens), window)]
    config = SchedulerConfig(16, 2 * -(-(window + 1) // 16), window, 1, window + 1, prefix_cache=False)
    engine = local_engine(checkpoint, kernels, config, choice=choice, kv_cache_dtype=kept)
    params = SamplingParams(1, temperature=0.0, prompt_logprobs=0)
    requests = [GenerationRequest(f"window-{i}", w, replace(params)) for i, w in enumerate(windows) if len(w) > 1]
    scores: list[float] = []
    for delta in run(engine, requests):
        if delta.prompt is not None:
            scores += [score.chosen for score in delta.prompt.tokens]
    return math.exp(-math.fsum(scores) / len(scores))


def show_quality(found: JSON, console: Console) -> None:
    parts = [part for part in ("experts", "dense", "head") if any(part in row for row in found["layers"])]
    table = Table("layer", *parts, title=f"relative error of weights, {found['weights']}", title_justify="left")
    for row in found["layers"]:
        table.add_row(row["layer"], *(f"{row[part]:.4f}" if part in row else "" for part in parts))
    if found["layers"]:
        console.print(table)
    stored, chosen = found["perplexity"]["stored"], found["perplexity"]["chosen"]
    console.print(
        f"perplexity of {found['tokens']} tokens: {stored:.4f} stored, {chosen:.4f} quantised "
        f"({chosen / stored - 1:+.2%})",
        highlight=False,
    )
