"""What `isotherm convert` writes: which tensors, into which files, and what config.json says of them. Pure, but for the
headers that are read.

Every size is known before a weight is read, so a file's header is too: a file that begins with the planned header and
has the planned length is whole, and need not be written again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.formats.base import ITEM_BYTES, WeightFormat
from isotherm.cluster.model.formats.compressed import METHOD, PackQuantized
from isotherm.cluster.model.formats.fp8 import BLOCK, CompressedFp8Blocks, Fp8Blocks
from isotherm.cluster.model.formats.gptq import Gptq
from isotherm.cluster.model.formats.int8 import Int8Groups
from isotherm.cluster.model.formats.mxfp4 import Mxfp4
from isotherm.cluster.model.formats.registry import PLAIN
from isotherm.cluster.model.tensors import TensorSpec
from isotherm.cluster.model.weight_choice import STORED, WeightChoice

SHARD_BYTES = 2 << 30
GROUP = 32  # of weights that are quantised here


class ConversionError(IsothermError, ValueError):
    """The checkpoint cannot be written as it is asked for; says why, and what can."""


@dataclass(frozen=True)
class OutTensor:
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Piece:
    """What is written of one weight, or of one tensor that is copied. `form`: "copy", or the form of
    kernels/formats/registry.py that the weight `source` is read in. `tensors`: role → what is written, in order."""

    source: str
    form: str
    tensors: dict[str, OutTensor]
    copied: dict[str, str] = field(default_factory=dict)  # role → the tensor of the checkpoint, where it is copied

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class OutShard:
    file: str
    pieces: tuple[Piece, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return len(self.header) + sum(piece.nbytes for piece in self.pieces)

    @property
    def tensors(self) -> Iterator[OutTensor]:
        for piece in self.pieces:
            yield from piece.tensors.values()


@dataclass(frozen=True)
class Conversion:
    shards: tuple[OutShard, ...]
    quantization_config: JSON

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def index(self) -> JSON:
        weight_map = {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


def plan_conversion(checkpoint: Checkpoint, choice: WeightChoice, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Raises ConversionError."""
    if choice.is_stored:
        raise ConversionError(
            "nothing is to be converted; give --experts int4, --dense fp8|int4 or --head fp8|int8|int4"
        )
    if choice.head == "int6":
        raise ConversionError(
            "--head is int6, which no checkpoint's format has here; leave it out, and serve with weights.head: int6"
        )
    if checkpoint.config.tie_word_embeddings and choice.head != STORED:
        raise ConversionError(f"--head is {choice.head}, and this model's head is its embedding table; leave it out")
    pieces, forms = [], {}
    for spec in checkpoint.weights():
        if not spec.quantisable:
            continue
        piece, form = _piece(checkpoint, spec, choice)
        pieces.append(piece)
        forms[spec.name] = form
    # All that is no projection: norms, tables, routers, and what the family does not know.
    taken = {name for piece in pieces for name in _sources(checkpoint, piece)}
    for name, info in checkpoint.tensors.items():
        if name not in taken:
            pieces.append(Piece(name, "copy", {"data": OutTensor(name, info.dtype, info.shape)}, {"data": name}))
    key = f"{checkpoint.digest()}: {choice.kept}"
    symmetric = not any("zero" in piece.tensors for piece in pieces)
    return Conversion(_shards(pieces, key, shard_bytes), quantization_config(forms, symmetric))


def _sources(checkpoint: Checkpoint, piece: Piece) -> list[str]:
    return list(checkpoint.tensors_of(piece.source))


def _piece(checkpoint: Checkpoint, spec: TensorSpec, choice: WeightChoice) -> tuple[Piece, WeightFormat]:
    """What becomes of a projection, and the format that it then has."""
    stored_as, form = checkpoint.format_of(spec.name), choice.form(spec)
    if isinstance(stored_as, Gptq):  # in other words, the same numbers
        scale = checkpoint.tensors[stored_as.tensor_name(spec.name, "scale")].dtype
        return _written(spec, PackQuantized(stored_as.group_size), "int4", scale, zeros=True)
    if isinstance(stored_as, Mxfp4) and form == STORED:
        raise ConversionError(
            f"{spec.name} is MXFP4, which cannot stand beside other weights of 4 bits; quantise it too"
        )
    if isinstance(stored_as, PackQuantized) and _has_loose_zeros(checkpoint, spec, stored_as):
        scale = checkpoint.tensors[stored_as.tensor_name(spec.name, "scale")].dtype
        return _written(spec, stored_as, "int4", scale, zeros=True)
    if form == STORED or isinstance(stored_as, PackQuantized) or form == stored_as.name:
        return _copied(checkpoint, spec, stored_as)
    return _written(spec, made_in(form), form, "F32" if form == "fp8" else "BF16")


def _has_loose_zeros(checkpoint: Checkpoint, spec: TensorSpec, stored_as: PackQuantized) -> bool:
    """Whether its zero points are stored one by one, which compressed-tensors reads no more."""
    zero = checkpoint.tensors.get(stored_as.tensor_name(spec.name, "zero"))
    return zero is not None and zero.dtype == "I8"


def made_in(form: str) -> WeightFormat:
    """The format of a weight that is quantised to a form of WeightChoice."""
    return {"int4": PackQuantized(GROUP), "fp8": CompressedFp8Blocks(), "int8": Int8Groups()}[form]


def kept_bytes(spec: TensorSpec, choice: WeightChoice, stored_as: WeightFormat, stored_bytes: int) -> int:
    """Of a weight where it is served: those that it is stored in, or fewer where it is quantised while it is read. What
    has four bits already stays as it is."""
    form = choice.form(spec)
    if form in (STORED, stored_as.name) or isinstance(stored_as, PackQuantized | Gptq):
        return stored_bytes
    if form == "int6":  # in no checkpoint's format; three quarters of the codes in eight bits, and the same scales
        return made_in("int8").nbytes(spec.shape) - math.prod(spec.shape) // 4
    if form == "int4":  # a byte for each scale, and two where it is written down
        return made_in(form).nbytes(spec.shape) - spec.shape[0] * -(-spec.shape[1] // GROUP)
    return made_in(form).nbytes(spec.shape)


def _copied(checkpoint: Checkpoint, spec: TensorSpec, stored_as: WeightFormat) -> tuple[Piece, WeightFormat]:
    written = CompressedFp8Blocks() if type(stored_as) is Fp8Blocks else stored_as
    names = {role: stored_as.tensor_name(spec.name, role) for role in stored_as.leaves}
    copied = {role: name for role, name in names.items() if name in checkpoint.tensors}
    tensors = {}
    for role, name in copied.items():
        info = checkpoint.tensors[name]
        tensors[role] = OutTensor(written.tensor_name(spec.name, role), info.dtype, info.shape)
    return Piece(spec.name, "copy", tensors, copied), written


def _written(
    spec: TensorSpec, written: WeightFormat, form: str, scale: str, zeros: bool = False
) -> tuple[Piece, WeightFormat]:
    wanted = {role: (w.dtypes[0], w.shape) for role, w in written.wants(spec.shape).items()}
    for role in ("scale", "scales"):
        if role in wanted:
            wanted[role] = (scale, wanted[role][1])
    if zeros:
        wanted["zero"] = ("I32", (-(-spec.shape[0] // 8), wanted["scale"][1][1]))
    tensors = {role: OutTensor(written.tensor_name(spec.name, role), *w) for role, w in wanted.items()}
    return Piece(spec.name, form, tensors), written


def _shards(pieces: list[Piece], key: str, shard_bytes: int) -> tuple[OutShard, ...]:
    parts: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if parts[-1] and size + piece.nbytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.nbytes
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    return tuple(OutShard(n, tuple(part), _header(part, key)) for n, part in zip(names, parts, strict=True))


def _header(pieces: list[Piece], key: str) -> bytes:
    """As safetensors has it, filled up so that the data is aligned. `key` says what the file was made of."""
    header: JSON = {"__metadata__": {"format": "pt", "made_of": key}}
    offset = 0
    for piece in pieces:
        for t in piece.tensors.values():
            header[t.name] = {
                "dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]
            }  # fmt: skip
            offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def quantization_config(forms: dict[str, WeightFormat], symmetric: bool = True) -> JSON:
    """compressed-tensors' words for weights that are in these formats; `symmetric`: none has zero points. Raises
    ConversionError."""
    by_format: dict[WeightFormat, list[str]] = {}
    for weight, form in forms.items():
        by_format.setdefault(form, []).append(weight)
    plain = by_format.pop(PLAIN, [])
    sizes = {f.group_size for f in by_format if isinstance(f, PackQuantized)}
    if len(sizes) > 1:
        raise ConversionError(
            f"weights would be in groups of {' and of '.join(map(str, sorted(sizes)))} inputs; a compressed-tensors "
            "checkpoint is served with one size alone: leave what has 4 bits already, and what has not, as they are"
        )
    groups = {}
    for i, (form, weights) in enumerate(by_format.items()):
        kind, scheme = _scheme(form, symmetric)
        groups[f"group_{i}"] = {
            "targets": patterns(weights),
            "weights": {"dynamic": False, "actorder": None, "observer": "minmax", **scheme},
            "input_activations": None,
            "output_activations": None,
            "format": kind,
        }
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns(plain),
        "kv_cache_scheme": None,
    }


def _scheme(form: WeightFormat, symmetric: bool) -> tuple[str, JSON]:
    if isinstance(form, PackQuantized):
        size = form.group_size
        return "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size,
                                  "symmetric": symmetric}  # fmt: skip
    if isinstance(form, Int8Groups):
        return "int-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": GROUP,
                                 "symmetric": True}  # fmt: skip
    return "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block",
                               "block_structure": [BLOCK, BLOCK], "symmetric": True}  # fmt: skip


def patterns(weights: list[str]) -> list[str]:
    """Regular expressions, as compressed-tensors has them, for the modules of these weights: numbers in their names
    stand for any number."""
    modules = (re.escape(weight.rpartition(".")[0]) for weight in weights)
    return list(dict.fromkeys("re:" + re.sub(r"\d+", r"\\d+", module) + "$" for module in modules))
