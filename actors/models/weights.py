"""Reads tensors of a checked checkpoint, each worker only its own, and quantises those that are to be kept in fewer
bits."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError, TensorInfo
from isotherm.cluster.model.fingerprint import Fingerprint
from isotherm.cluster.model.kv_cache import KvCacheDtype, dtype_words
from isotherm.cluster.model.tensors import TensorSpec, mlp_projections
from isotherm.cluster.model.weight_choice import STORED, WeightChoice
from isotherm.kernels.formats.grouped import Int4Weight
from isotherm.kernels.formats.registry import quantised, stored_weight
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.ops import Kernels

THREADS = 4  # that read at once; a disk, and more so a network's, is at its best with several requests
BLOCK_BYTES = 16 << 20  # that are copied at once
# Of the checkpoint that may have been read, or be under way, before they are asked for: at most, and at least where
# that is more than AHEAD_SHARE of what is read; so a small worker too takes little more memory than its weights.
AHEAD_BYTES, LEAST_AHEAD_BYTES, AHEAD_SHARE = 128 << 20, 16 << 20, 1 / 32

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class WeightReader:
    """Use as a context manager. Files are read, not mapped: of what is read only what is kept stays in this process's
    memory. `tensor` and `stored` may be called in any order; what `ahead` was told of is read before it is asked for,
    by several threads, and quantised there."""

    def __init__(self, checkpoint: Checkpoint, choice: WeightChoice | None = None):
        self.checkpoint = checkpoint
        self.choice = choice or WeightChoice()
        self.bytes_read = 0
        self._lock = threading.Lock()  # of the above and of the files
        self._files: dict[Path, int] = {}
        self._specs: dict[str, TensorSpec] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: OrderedDict[str, int] = OrderedDict()  # weights to be read ahead, with their stored bytes
        self._under_way: dict[str, tuple[Future[StoredWeight], int]] = {}
        self._room = 0

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        while self._files:
            os.close(self._files.popitem()[1])

    def tensor(self, name: str) -> Tensor:
        """A copy of its own. Raises CheckpointError."""
        info = self.checkpoint.tensors[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(info, data.numpy().data, name)
        return data.view(DTYPES[info.dtype]).view(info.shape)

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, a part at a time, each valid until the next. Raises CheckpointError."""
        info = self.checkpoint.tensors[name]
        buffer = memoryview(bytearray(min(info.nbytes, BLOCK_BYTES)))
        for at in range(0, info.nbytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, info.nbytes - at)
            self._fill(replace(info, nbytes=size, offset=info.offset + at), buffer[:size], name)
            yield buffer[:size]

    def _fill(self, info: TensorInfo, buffer: memoryview, name: str) -> None:
        try:
            file, done = self._file(info.file), 0
            while done < info.nbytes:
                got = os.preadv(file, [buffer[done:]], info.offset + done)
                if not got:
                    raise OSError(f"it ends {info.nbytes - done} bytes too early")
                done += got
        except OSError as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read ({error})") from None
        with self._lock:
            self.bytes_read += info.nbytes

    @contextmanager
    def ahead(self, weights: Iterable[str]) -> Iterator[None]:
        """Inside, these weights are read ahead, in this order, for `stored`."""
        self._waiting.update((name, self._nbytes(name)) for name in weights)
        self._room = min(AHEAD_BYTES, max(LEAST_AHEAD_BYTES, int(AHEAD_SHARE * sum(self._waiting.values()))))
        self._pool = self._pool or ThreadPoolExecutor(THREADS, "weights")
        self._read_on()
        try:
            yield
        finally:
            self._waiting.clear()
            while self._under_way:
                _, (future, size) = self._under_way.popitem()
                future.cancel()
                self._room += size

    def _nbytes(self, weight: str) -> int:
        return sum(info.nbytes for info in self.checkpoint.tensors_of(weight).values())

    def _read_on(self) -> None:
        while self._pool is not None and self._waiting and self._room > 0:
            name, size = self._waiting.popitem(last=False)
            self._room -= size
            self._under_way[name] = self._pool.submit(self._load, name), size

    def is_cached(self, weights: Iterable[str]) -> bool:
        """Whether these lie in the page cache, as far as the ends of their tensors tell; False where the system does
        not say. Reads nothing from a disk."""
        flag = getattr(os, "RWF_NOWAIT", None)
        if flag is None:
            return False
        probe = [bytearray(1)]
        try:
            for name in weights:
                for info in self.checkpoint.tensors_of(name).values():
                    for at in (info.offset, info.offset + info.nbytes - 1):
                        os.preadv(self._file(info.file), probe, at, flag)
        except OSError:  # EAGAIN: not there; EOPNOTSUPP: the file system does not tell
            return False
        return True

    def _file(self, path: Path) -> int:
        with self._lock:
            if (file := self._files.get(path)) is None:
                file = self._files[path] = os.open(path, os.O_RDONLY)
            return file

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers. They are read a part at a time, as far as they are the same."""
        if not {one, other} <= self.checkpoint.tensors.keys():
            return False  # one of them is stored in several
        infos = self.checkpoint.tensors[one], self.checkpoint.tensors[other]
        if infos[0].dtype != infos[1].dtype or infos[0].shape != infos[1].shape:
            return False
        blocks = zip(self.blocks(one), self.blocks(other), strict=True)
        return all(torch.equal(*(torch.frombuffer(b, dtype=torch.uint8) for b in pair)) for pair in blocks)

    def stored(self, name: str) -> StoredWeight:
        """A projection, in the form that is chosen for it: as it is stored, in whatever format, or quantised."""
        self._waiting.pop(name, None)
        if (there := self._under_way.pop(name, None)) is None:
            return self._load(name)
        future, size = there
        weight = future.result()
        self._room += size
        self._read_on()
        return weight

    def head(self, name: str) -> StoredWeight:
        """The output projection, which may be the embedding table too."""
        return self.stored(name) if self._form(name) == self.choice.head else self._load(name, self.choice.head)

    def _load(self, name: str, form: str | None = None) -> StoredWeight:
        stored_as = self.checkpoint.format_of(name)
        names = {role: stored_as.tensor_name(name, role) for role in stored_as.leaves}
        tensors = {role: self.tensor(leaf) for role, leaf in names.items() if leaf in self.checkpoint.tensors}
        form = form or self._form(name)
        try:
            weight = stored_weight(stored_as.name, tensors, stored_as.parameters)
            # What has four bits already gains nothing from eight.
            if form == STORED or isinstance(weight, Int4Weight):
                return weight
            return quantised(form, weight, self._both_ways(name))
        except (ValueError, TypeError) as error:
            where = self.checkpoint.tensors[next(leaf for leaf in names.values() if leaf in self.checkpoint.tensors)]
            raise CheckpointError(f"{where.file}: weight {name}: {error}") from None

    def _form(self, name: str) -> str:
        if self.choice.is_stored:
            return STORED
        return self.choice.form(spec) if (spec := self._spec(name)) else STORED

    def _both_ways(self, name: str) -> tuple[int, int] | None:
        return spec.both_ways if (spec := self._spec(name)) else None

    def _spec(self, name: str) -> TensorSpec | None:
        if self._specs is None:
            self._specs = {spec.name: spec for spec in self.checkpoint.weights()}
        return self._specs.get(name)

    def mlp(self, prefix: str) -> tuple[StoredWeight, StoredWeight, StoredWeight]:
        """gate, up and down projections."""
        gate, up, down = map(self.stored, mlp_projections(prefix))
        return gate, up, down

    def expert(self, layer: int, expert: int) -> tuple[StoredWeight, StoredWeight, StoredWeight]:
        gate, up, down = map(self.stored, self.checkpoint.config.expert_projections(layer, expert))
        return gate, up, down


def own_fingerprint(
    checkpoint: Checkpoint, kernels: Kernels, choice: WeightChoice, kv_cache_dtype: KvCacheDtype = "auto"
) -> Fingerprint:
    """What decides the bits that this process computes. Reads a sample of the weights: tenths of a second, for a large
    checkpoint seconds."""
    return Fingerprint(
        weights=checkpoint.digest(),
        dtype=dtype_words(str(kernels.dtype).removeprefix("torch."), kv_cache_dtype),
        kept=choice.kept,
        device=kernels.device.type,
        kernels=kernels.name,
        summation=kernels.summation,
        instructions=kernels.instructions,
    )


def parse_dtype(name: str) -> torch.dtype:
    """Activation dtype of a manifest or flag."""
    try:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    except KeyError:
        raise ValueError(f'dtype is "{name}"; it must be "bfloat16" or "float32"') from None
