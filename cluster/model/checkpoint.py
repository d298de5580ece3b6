"""A hub-layout checkpoint seen through its config, index and safetensors headers. Reads no weights, but for a sample
of them, and needs no torch."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.formats.base import FLOATS, ITEM_BYTES, Wanted, WeightFormat
from isotherm.cluster.model.formats.registry import PLAIN, foreign_tensors, format_of, weight_dtypes
from isotherm.cluster.model.registry import load_config
from isotherm.cluster.model.tensors import Part, TensorSpec

INDEX = "model.safetensors.index.json"
SAMPLE_BYTES, SAMPLED_TENSORS = 4096, 4096
UNNAMED_FAMILY = "deepseek_v3"  # was the only one when digests were first made: they do not name it
# Of ModelConfig: what no logit depends on.
NO_NUMERICS = {"num_nextn_predict_layers", "drafting_layers", "quantisation", "stored_dtype", "eos_token_ids"}
log = logging.getLogger(__name__)
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself


class CheckpointError(IsothermError, ValueError):
    """The checkpoint cannot be served; the message names file, tensor, what was expected and what was found."""


class NoWeightFilesError(CheckpointError):
    """There is neither a weight file nor an index."""


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
    # Tensors that the index names and that are in no file, with the file that it says. Nobody may need them.
    absent: dict[str, Path] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Check config.json, the index and every header. Raises ModelConfigError or CheckpointError."""
        config = load_config(path)
        checkpoint = Checkpoint(path, config, *read_headers(path))
        for spec in config.tensors():
            checkpoint._check(spec)
        checkpoint._check_content()
        if absent := checkpoint.absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            log.warning("%s: names what is not there, and not needed: %s%s", path / INDEX, next(iter(absent)), more)
        return checkpoint

    def _check_content(self) -> None:
        """Of one quantised weight, what its headers do not show."""
        for spec in self.config.tensors():
            stored_as = self.format_of(spec.name) if spec.quantisable else PLAIN
            if stored_as is not PLAIN:
                names = {role: stored_as.tensor_name(spec.name, role) for role in stored_as.leaves}
                there = {role: partial(_content, n, self.tensors[n]) for role, n in names.items() if n in self.tensors}
                if reason := stored_as.refusal(there):
                    raise CheckpointError(f"{self.path}: weight {spec.name} {reason}")
                return

    def weights(self) -> Iterator[TensorSpec]:
        """Every tensor that the family knows, those of multi-token-prediction layers that are here among them."""
        yield from self.config.tensors()
        yield from self.mtp_weights()

    def mtp_weights(self) -> Iterator[TensorSpec]:
        """Of multi-token-prediction layers, as far as they are here."""
        for layer in sorted({layer for name in self.tensors if (layer := self.config.mtp_layer(name)) is not None}):
            for spec in self.config.mtp_tensors(layer):  # a layer that nobody needs may have lost some
                if self.tensors_of(spec.name, spec.quantisable):
                    yield spec

    def _check(self, spec: TensorSpec) -> None:
        stored_as = self.format_of(spec.name) if spec.quantisable else PLAIN
        first = stored_as.tensor_name(spec.name, next(iter(stored_as.leaves)))
        main = self.tensors.get(first)
        for role in stored_as.leaves if self.absent else ():
            if (file := self.absent.get(name := stored_as.tensor_name(spec.name, role))) is not None:
                words = f"tensor {name} is in {INDEX} but not in the file"
                raise CheckpointError(f"{file}: {words if file.exists() else f'is named by {INDEX} but is not there'}")
        for role, wanted in stored_as.wants(spec.shape).items():
            name = stored_as.tensor_name(spec.name, role)
            found = self.tensors.get(name)
            if main is None:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is missing; expected shape {list(wanted.shape)}"
                    f"{self._in_other_words(spec, stored_as)}"
                )
            if found is None:
                raise CheckpointError(
                    f"{main.file}: tensor {first}: is {main.dtype}, but {name} is missing; "
                    f"expected shape {list(wanted.shape)}"
                )
            allowed = weight_dtypes() if stored_as is PLAIN and spec.quantisable else wanted.dtypes
            _check_found(name, found, wanted, allowed)
        for role, layouts in stored_as.optional(spec.shape).items():
            name = stored_as.tensor_name(spec.name, role)
            if (found := self.tensors.get(name)) is not None:
                wanted = next((w for w in layouts if found.dtype in w.dtypes), layouts[0])
                _check_found(name, found, wanted, [dtype for layout in layouts for dtype in layout.dtypes])
        for name in foreign_tensors(spec.name, stored_as):
            if main is not None and (other := self.tensors.get(name)) is not None:
                raise CheckpointError(
                    f"{main.file}: tensor {first}: is {main.dtype}, but {name} stands in {other.file.name}; "
                    f"a {stored_as.name} weight has none"
                )

    def _in_other_words(self, spec: TensorSpec, stored_as: WeightFormat) -> str:
        """What is there of a weight of which the main tensor is not, for a message."""
        names = foreign_tensors(spec.name, stored_as) if spec.quantisable else []
        there = [f"`{name.rpartition('.')[2]}`" for name in names if name in self.tensors]
        if not there:
            return ""
        are = "is" if len(there) == 1 else "are"
        return f", but {', '.join(there)} {are} there, which config.json does not describe"

    def format_of(self, weight: str) -> WeightFormat:
        """How a projection is stored: what the headers say, which need not be what config.json says."""
        return format_of(
            weight, lambda name: info.dtype if (info := self.tensors.get(name)) else None, self.config.quantisation
        )

    def tensors_of(self, weight: str, quantisable: bool = True) -> dict[str, TensorInfo]:
        """The tensors that a weight is stored as, by name."""
        stored_as = self.format_of(weight) if quantisable else PLAIN
        names = (stored_as.tensor_name(weight, role) for role in stored_as.leaves)
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def nbytes_by_part(self) -> dict[Part, int]:
        """Stored bytes, scales included. MTP is whatever the family says belongs to it."""
        totals = {part: 0 for part in Part}
        for spec in self.config.tensors():
            totals[spec.part] += sum(info.nbytes for info in self.tensors_of(spec.name, spec.quantisable).values())
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
        if self.config.quantisation is not None and (parameters := self.config.quantisation.parameters):
            digest.update(json.dumps(parameters, sort_keys=True).encode())
        names: dict[bool, list[str]] = {False: [], True: []}  # by whether they are routed experts'
        for spec in self.config.tensors():
            for name, info in self.tensors_of(spec.name, spec.quantisable).items():
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                names[spec.part is Part.ROUTED_EXPERTS].append(name)
        for name in sampled(names[False], names[True]):
            digest.update(_sample(name, self.tensors[name]))
        return digest.hexdigest()[:16]

    def weight_format(self) -> str:
        """How the weights are stored, in words: what the headers say, which need not be what config.json says."""
        stored: Counter[str] = Counter()
        for spec in self.config.tensors():
            if spec.quantisable:
                stored_as, tensors = self.format_of(spec.name), self.tensors_of(spec.name)
                words = FLOATS[self.tensors[spec.name].dtype] if stored_as is PLAIN else stored_as.words()
                stored[words] += sum(info.nbytes for info in tensors.values())
        narrow = stored.keys() - FLOATS.values()
        return max(narrow or stored, key=lambda words: stored[words])

    def mtp_tensors(self) -> list[str]:
        """Names of the tensors of multi-token-prediction layers."""
        return [name for name in self.tensors if self.config.mtp_layer(name) is not None]

    @property
    def has_mtp(self) -> bool:
        """Whether the files have a layer that can draft, whatever config.json says."""
        return any(self.config.mtp_layer(name) == self.config.num_hidden_layers for name in self.tensors)

    def with_mtp(self) -> Checkpoint:
        """The same with its first multi-token-prediction layer in use. Raises CheckpointError where it is not whole."""
        for spec in self.config.mtp_tensors(self.config.num_hidden_layers):
            self._check(spec)
        return replace(self, config=replace(self.config, drafting_layers=1))

    def drafting(self, kind: str) -> tuple[Checkpoint, str]:
        """What it is where speculation is of this kind: auto, mtp, ngram or off; and which of the last three that comes
        to. Raises CheckpointError."""
        if kind == "mtp" and not self.has_mtp:
            raise CheckpointError(
                f"{self.path}: has no multi-token-prediction layer, which speculation of kind mtp needs; ngram does not"
            )
        if kind == "auto":
            try:
                return (self.with_mtp(), "mtp") if self.has_mtp else (self, "ngram")
            except CheckpointError as error:
                log.warning("its multi-token-prediction layer is not whole, so prompts are looked up: %s", error)
                return self, "ngram"
        return (self.with_mtp() if kind == "mtp" else self), kind


def _check_found(name: str, found: TensorInfo, wanted: Wanted, allowed: Sequence[str]) -> None:
    """`allowed`: the dtypes that a message names."""
    where = f"{found.file}: tensor {name}"
    if found.shape != wanted.shape:
        raise CheckpointError(f"{where}: expected shape {list(wanted.shape)}, found {list(found.shape)}")
    if found.dtype not in wanted.dtypes:
        raise CheckpointError(f"{where}: expected dtype {', '.join(allowed)}, found {found.dtype}")


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
    return _content(name, info, begin, min(SAMPLE_BYTES, info.nbytes))


def _content(name: str, info: TensorInfo, begin: int = 0, size: int | None = None) -> bytes:
    """Bytes of a tensor: all, or so many from `begin`."""
    try:
        with open(info.file, "rb", buffering=0) as stream:
            stream.seek(info.offset + begin)
            return stream.read(info.nbytes if size is None else size)
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
    raise NoWeightFilesError(f"{path}: has no *.safetensors file")


def read_headers(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Path]]:
    """Every tensor of the checkpoint by name; and those that the index alone names, with their files. Raises
    CheckpointError."""
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
    return tensors, {name: path / file for name, file in (weight_map or {}).items() if name not in tensors}


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Empty where an index names a file that is not there."""
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file: header length {length}, file size {size}")
            raw = json.loads(stream.read(length))
    except FileNotFoundError:
        return {}
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
