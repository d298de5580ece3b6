"""Writes the files of a conversion (cluster/model/conversion.py), weight by weight, in the memory of a few weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.checkpoint import INDEX, Checkpoint
from isotherm.cluster.model.conversion import Conversion, ConversionError, OutShard, Piece, plan_conversion
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import INT4_ZERO, Int4Weight, Int8Weight
from isotherm.kernels.formats.published import packed_words, packed_zeros

PARTIAL = ".partial"
# What says what the model is: tokenizer, templates.
OTHER_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt")
SCALES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def convert(
    source: Path,
    out: Path,
    choice: WeightChoice,
    shard_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Write the checkpoint in `source` to `out` with its weights as `choice` has them. Files that an earlier call has
    written whole are left as they are. `progress` is told the bytes of `out` that are there, and that there will be.
    Raises ConversionError, ModelConfigError or CheckpointError."""
    checkpoint = Checkpoint.open(source)
    plan = plan_conversion(checkpoint, choice, shard_bytes) if shard_bytes else plan_conversion(checkpoint, choice)
    _check_folder(source, out, plan)
    out.mkdir(parents=True, exist_ok=True)
    total, done = sum(shard.nbytes for shard in plan.shards), 0
    with WeightReader(checkpoint, choice) as reader:
        for shard in plan.shards:
            if not is_whole(out / shard.file, shard):
                _write_shard(out / shard.file, shard, reader, partial(_told, progress, done, total))
            done += shard.nbytes
            progress(done, total)
    for pattern in OTHER_FILES:
        for file in sorted(source.glob(pattern)):
            if file.name not in ("config.json", INDEX):
                copy = out / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    _write(out / INDEX, json.dumps(plan.index, indent=1).encode())
    config = with_quantisation(json.loads((source / "config.json").read_text()), plan.quantization_config)
    _write(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())  # last: now it is a model
    Checkpoint.open(out)
    return plan


def with_quantisation(config: JSON, quantisation: JSON) -> JSON:
    """config.json with another quantization_config, in the place where this one has it, and in no other: of two, some
    readers would take the old one."""
    name, text = "quantization_config", config.get("text_config")
    kept = {key: value for key, value in config.items() if key != name}
    if not isinstance(text, dict):
        return kept | {name: quantisation}
    if config.get(name) is None:
        return kept | {"text_config": text | {name: quantisation}}
    return kept | {"text_config": {key: value for key, value in text.items() if key != name}, name: quantisation}


def _told(progress: Callable[[int, int], None], before: int, total: int, written: int) -> None:
    progress(before + written, total)


def _check_folder(source: Path, out: Path, plan: Conversion) -> None:
    if out.exists() and out.resolve() == source.resolve():
        raise ConversionError(f"{out} is the checkpoint itself; name another folder")
    ours = {shard.file for shard in plan.shards}
    others = sorted(file.name for file in out.glob("*.safetensors") if file.name not in ours)
    if others:
        raise ConversionError(f"{out} holds {others[0]}, which is not of this conversion; name an empty folder")


def is_whole(file: Path, shard: OutShard) -> bool:
    """Whether an earlier run has written this file: its name comes last, its header says of what it was made."""
    try:
        with open(file, "rb") as stream:
            return os.fstat(stream.fileno()).st_size == shard.nbytes and stream.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        return False


def _write_shard(file: Path, shard: OutShard, reader: WeightReader, progress: Callable[[int], None]) -> None:
    unfinished = file.with_name(file.name + PARTIAL)
    with open(unfinished, "wb") as stream, reader.ahead(p.source for p in shard.pieces if p.form != "copy"):
        stream.write(shard.header)
        for piece in shard.pieces:
            if piece.form == "copy":
                for role in piece.tensors:
                    for block in reader.blocks(piece.copied[role]):
                        stream.write(block)
            else:
                written = _tensors(piece, reader)
                for role, wanted in piece.tensors.items():
                    assert written[role].nbytes == wanted.nbytes, (wanted, written[role].shape)
                    _put(stream, written[role])
            progress(stream.tell())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)


def _tensors(piece: Piece, reader: WeightReader) -> dict[str, Tensor]:
    """What a weight is made of, by the roles of the format that it is written in."""
    weight = reader.stored(piece.source)
    if isinstance(weight, Int4Weight):
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full(weight.scales.shape, INT4_ZERO, dtype=torch.uint8)
        return {
            "packed": packed_words(weight.nibbles),
            "scale": weight.scales.to(SCALES[piece.tensors["scale"].dtype]),
            "shape": torch.tensor(weight.shape, dtype=torch.int64),
            "zero": packed_zeros(zeros),
        }
    if isinstance(weight, Int8Weight):
        return {"data": weight.data, "scales": weight.scales.to(torch.bfloat16)}
    assert isinstance(weight, Fp8Weight), type(weight)
    return {"data": weight.data, "scale": weight.scale}


def _put(stream: BinaryIO, tensor: Tensor) -> None:
    stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write(file: Path, content: bytes) -> None:
    unfinished = file.with_name(file.name + PARTIAL)
    unfinished.write_bytes(content)
    os.replace(unfinished, file)
