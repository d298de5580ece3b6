"""A hub-layout checkpoint seen through its config, index and safetensors headers. Reads no weights, but for a sample
of them, and needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.registry import load_config
from isotherm.cluster.model.tensors import Part, TensorSpec

INDEX = "model.safetensors.index.json"
FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
BLOCK = 128
FP8_WORDS = f"FP8 e4m3, {BLOCK}×{BLOCK} blocks"
SAMPLE_BYTES, SAMPLED_TENSORS = 4096, 4096
UNNAMED_FAMILY = "deepseek_v3"  # was the only one when digests were first made: they do not name it
# Of ModelConfig: what no logit depends on.
NO_NUMERICS = {"num_nextn_predict_layers", "fp8", "stored_dtype", "eos_token_ids"}
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself
WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors' words and in torch's
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
              "U16": 2, "U8": 1, "BOOL": 1, FP8: 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip


class CheckpointError(ValueError):
    """The checkpoint cannot be served; the message names file, tensor, what was expected and what was found."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    file: Path
    dtype: str  # safetensors' name: BF16, F8_E4M3, …
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0  # in the file


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose tensors were found to be complete and of the right shapes. Weights are not read."""

    path: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Check config.json, the index and every header. Raises ModelConfigError or CheckpointError."""
        config = load_config(path)
        checkpoint = Checkpoint(path, config, read_headers(path))
        for spec in config.tensors():
            checkpoint._check(spec)
        return checkpoint

    def _check(self, spec: TensorSpec) -> None:
        found = self.tensors.get(spec.name)
        if found is None:
            raise CheckpointError(f"{self.path}: tensor {spec.name} is missing; expected shape {list(spec.shape)}")
        where = f"{found.file}: tensor {spec.name}"
        if found.shape != spec.shape:
            raise CheckpointError(f"{where}: expected shape {list(spec.shape)}, found {list(found.shape)}")
        scale = self.tensors.get(spec.name + SCALE_SUFFIX)
        if found.dtype != FP8:
            if scale is not None:
                raise CheckpointError(
                    f"{where}: is {found.dtype}, but has a {SCALE_SUFFIX} in {scale.file.name}; "
                    f"only {FP8} tensors have one"
                )
            if found.dtype not in WEIGHT_DTYPES:
                allowed = (*WEIGHT_DTYPES, FP8) if spec.quantisable else WEIGHT_DTYPES
                raise CheckpointError(f"{where}: expected dtype {', '.join(allowed)}, found {found.dtype}")
            return
        if not spec.quantisable:
            raise CheckpointError(f"{where}: expected dtype {', '.join(WEIGHT_DTYPES)}, found {FP8}")
        expected = tuple(-(-n // BLOCK) for n in spec.shape)
        if scale is None:
            raise CheckpointError(
                f"{where}: is {FP8}, but {spec.name}{SCALE_SUFFIX} is missing; expected shape {list(expected)}"
            )
        if scale.shape != expected or scale.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{scale.file}: tensor {spec.name}{SCALE_SUFFIX}: expected float32 {list(expected)}, "
                f"found {scale.dtype} {list(scale.shape)}"
            )

    def nbytes_by_part(self) -> dict[Part, int]:
        """Stored bytes, block scales included. MTP is whatever the family says belongs to it."""
        totals = {part: 0 for part in Part}
        for spec in self.config.tensors():
            totals[spec.part] += self.tensors[spec.name].nbytes
            if scale := self.tensors.get(spec.name + SCALE_SUFFIX):
                totals[spec.part] += scale.nbytes
        totals[Part.MTP] = sum(self.tensors[name].nbytes for name in self.mtp_tensors())
        return {part: n for part, n in totals.items() if n}

    def digest(self) -> str:
        """A hash of what the weights are: of config.json as far as it says how to compute, of every tensor's name,
        dtype and shape, and of a sample of the bytes, since reading 700 GB would take minutes: SAMPLE_BYTES each of
        at most SAMPLED_TENSORS tensors, at a place that depends on the name; first of all that are no routed
        expert's, then of experts spread over the model. So another training step, quantisation or model is seen, and
        one altered byte is not. Paths, times, and how tensors are dealt out to files do not matter. Raises
        CheckpointError."""
        kept = {name: value for name, value in asdict(self.config).items() if name not in NO_NUMERICS}
        if self.config.model_type == UNNAMED_FAMILY:
            del kept["model_type"]
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        names: dict[bool, list[str]] = {False: [], True: []}  # by whether they are routed experts'
        for spec in self.config.tensors():
            for name in (spec.name, spec.name + SCALE_SUFFIX):
                if (info := self.tensors.get(name)) is not None:
                    digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                    names[spec.part is Part.ROUTED_EXPERTS].append(name)
        for name in sampled(names[False], names[True]):
            digest.update(_sample(name, self.tensors[name]))
        return digest.hexdigest()[:16]

    def weight_format(self) -> str:
        """How the weights are stored, in words: what the headers say, which need not be what config.json says."""
        projections = [self.tensors[spec.name] for spec in self.config.tensors() if spec.quantisable]
        if any(info.dtype == FP8 for info in projections):
            return FP8_WORDS
        stored = {dtype: sum(info.nbytes for info in projections if info.dtype == dtype) for dtype in WEIGHT_DTYPES}
        return WEIGHT_DTYPES[max(stored, key=lambda dtype: stored[dtype])]

    def mtp_tensors(self) -> list[str]:
        """Names of the tensors of multi-token-prediction layers; recognised, and not used to serve yet."""
        return [name for name in self.tensors if self.config.mtp_layer(name) is not None]


def sampled(others: list[str], experts: list[str]) -> list[str]:
    """Those of which `Checkpoint.digest` reads a part: all that are no routed expert's, and experts spread over the
    model."""
    step = max(1, -(-len(experts) // max(1, SAMPLED_TENSORS - len(others))))
    # An expert has three projections, with their scales six tensors: none of them is to be passed over always.
    while step > 1 and (step % 2 == 0 or step % 3 == 0):
        step += 1
    return others + experts[::step]


def _sample(name: str, info: TensorInfo) -> bytes:
    begin = zlib.crc32(name.encode()) % (info.nbytes - SAMPLE_BYTES) if info.nbytes > SAMPLE_BYTES else 0
    try:
        with open(info.file, "rb", buffering=0) as stream:
            stream.seek(info.offset + begin)
            return stream.read(min(SAMPLE_BYTES, info.nbytes))
    except OSError as error:
        raise CheckpointError(f"{info.file}: tensor {name} cannot be read ({error})") from None


def shard_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint, and the index's weight_map where there is one. Raises CheckpointError."""
    index = path / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error!r})") from None
        if any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise CheckpointError(f"{index}: weight_map must name files in the same directory")
        return [path / name for name in names], weight_map
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files, None
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise CheckpointError(
            f"{pickles[0]}: is a pickle, which can run code when it is loaded; convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{path}: has no *.safetensors file")


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name. Raises CheckpointError."""
    files, weight_map = shard_files(path)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(file).items():
            if weight_map is not None and weight_map.get(name) != file.name:
                continue  # the index says which copy counts
            if name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {name} stands also in {tensors[name].file.name}, and no index says which counts"
                )
            tensors[name] = info
    for name, file_name in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(f"{path / file_name}: tensor {name} is in {INDEX} but not in the file")
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file: header length {length}, file size {size}")
            raw = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is named by {INDEX} but is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: its safetensors header cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: its safetensors header is not an object")
    raw.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in raw.items():
        try:
            dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if any(type(n) is not int for n in (*shape, begin, end)):
                raise TypeError(f"shape {entry['shape']} and data_offsets {entry['data_offsets']} must be integers")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {name}: malformed header entry ({error!r})") from None
        if dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{file}: tensor {name}: dtype {dtype} is not known; expected one of {', '.join(ITEM_BYTES)}"
            )
        expected = math.prod(shape) * ITEM_BYTES[dtype]
        if min(shape, default=0) < 0 or end - begin != expected or begin < 0:
            raise CheckpointError(
                f"{file}: tensor {name}: {dtype} {list(shape)} expected {expected} bytes, "
                f"found offsets [{begin}, {end}]"
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{file}: tensor {name}: is truncated: expected {8 + length + end} bytes of file, found {size}"
            )
        tensors[name] = TensorInfo(file, dtype, shape, end - begin, 8 + length + begin)
        spans.append((begin, end, name))
    covered, previous = 0, ""
    for begin, end, name in sorted(spans):
        if begin < covered:
            raise CheckpointError(f"{file}: tensors {previous} and {name} overlap")
        if begin > covered:
            raise CheckpointError(f"{file}: tensor {name}: expected to begin at data offset {covered}, found {begin}")
        covered, previous = end, name
    if 8 + length + covered != size:
        raise CheckpointError(
            f"{file}: expected {8 + length + covered} bytes of file, found {size}: "
            "there is something behind the last tensor"
        )
    return tensors
