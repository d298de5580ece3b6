"""Weights as the kernels read them, and the expert bank.

A packed matrix keeps its stored width (FP8 stays FP8) with rows padded to a multiple of ROW_PAD and columns to one of
COLUMN_PAD, so that tiles need no mask and every row starts on 16 bytes. FP8 scales keep one value per 128×128 block;
`scale_rows` [padded rows] says which row of scales an output uses, since parts that stand side by side need not be
multiples of 128.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.kernels.checked import check_expert, check_weights
from isotherm.kernels.formats.fp8 import BLOCK, E4M3, Fp8Weight
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.ops import ExpertBank
from isotherm.kernels.triton.launch import cdiv

ROW_PAD, COLUMN_PAD = 128, 128
SPLIT_PROGRAMS = 132  # multiprocessors of a full Hopper GPU. A constant: the bits depend on it
STAGING_BYTES = 64 << 20
SPLIT_TILE, SPLIT_LEAST = 64, 512  # outputs of a small tile; the least of K that is worth a program of its own


@dataclass(frozen=True)
class PackedMatrix:
    """`data` [rows, columns], padded; `scale` float32 [scale rows, columns / 128] and `scale_rows` int32 [rows], for
    FP8 only.

    K is summed in `splits` parts of `k_split`, fixed by the shape alone.
    """

    data: Tensor
    scale: Tensor | None
    scale_rows: Tensor | None
    k_split: int
    splits: int

    @property
    def fp8(self) -> bool:
        return self.scale is not None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.scale_rows) if t is not None)


@dataclass(frozen=True)
class PackedHeads:
    """One matrix per head: `data` [heads, padded outputs, padded inputs]."""

    data: Tensor
    outputs: int
    inputs: int


def k_splits(outputs: int, inputs: int) -> tuple[int, int]:
    """(inputs per part, parts): as many parts as keep the GPU busy with one row, none shorter than SPLIT_LEAST."""
    blocks = cdiv(inputs, BLOCK)
    parts = max(1, min(SPLIT_PROGRAMS // cdiv(outputs, SPLIT_TILE), inputs // SPLIT_LEAST))
    each = cdiv(blocks, parts)
    return each * BLOCK, cdiv(blocks, each)


class Uploader:
    """Copies from the CPU to `device`, through one pinned buffer where that is a GPU. Threads take turns."""

    def __init__(self, device: torch.device):
        self.device = device
        self._lock = threading.Lock()
        self._staging: Tensor | None = None
        self._free: torch.cuda.Event | None = None

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """target[...] = source, converted to target's dtype, in order with this thread's stream. Both have one shape;
        target may be strided."""
        if self.device.type != "cuda" or source.device.type == "cuda":
            target.copy_(source)
            return
        with self._lock:
            if self._staging is None or self._free is None:
                self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
                self._free = torch.cuda.Event()
            # A row of a stored weight is far smaller than the buffer.
            at_once = max(1, STAGING_BYTES // max(1, target[:1].numel() * target.itemsize))
            for some, place in zip(source.split(at_once), target.split(at_once), strict=True):
                self._free.synchronize()  # the copy before may still read the buffer
                staged = self._staging[: some.numel() * target.itemsize].view(target.dtype).view(some.shape)
                staged.copy_(some)
                place.copy_(staged, non_blocking=True)
                self._free.record()

    def wait(self) -> None:
        """Until what was uploaded may be read on any stream, and what was launched has finished with what is about to
        be freed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def as_kept(weights: Sequence[StoredWeight], dtype: torch.dtype) -> list[Fp8Weight] | list[PlainWeight]:
    """The weights as the kernels multiply by them: in FP8 where all are stored so, which is the one format that is read
    as it is stored; else the numbers."""
    fp8 = [w for w in weights if isinstance(w, Fp8Weight)]
    return fp8 if len(fp8) == len(weights) else [w.plain(dtype) for w in weights]


def pack(weights: Sequence[StoredWeight], dtype: torch.dtype, upload: Uploader, splits: bool = True) -> PackedMatrix:
    """Weights one above the other. Other widths than FP8 and `dtype` are converted, but for bfloat16, which float32
    kernels widen in registers."""
    outputs, inputs = check_weights(weights)
    rows, columns = cdiv(outputs, ROW_PAD) * ROW_PAD, cdiv(inputs, COLUMN_PAD) * COLUMN_PAD
    kept = as_kept(weights, dtype)
    fp8 = [w for w in kept if isinstance(w, Fp8Weight)]
    # FP8 as bytes, because copying float8 to a padded place is not offered for every device.
    width = torch.uint8 if fp8 else torch.bfloat16 if all(w.data.dtype == torch.bfloat16 for w in kept) else dtype
    data = torch.zeros(rows, columns, dtype=width, device=upload.device)
    place = 0
    for weight in kept:
        count = weight.shape[0]
        upload(weight.data.view(torch.uint8) if fp8 else weight.data, data[place : place + count, :inputs])
        place += count
    k_split, parts = k_splits(outputs, inputs) if splits else (columns, 1)
    if not fp8:
        return PackedMatrix(data, None, None, k_split, parts)
    scale, scale_rows = pack_scales(fp8, rows, upload)
    return PackedMatrix(data.view(E4M3), scale, scale_rows, k_split, parts)


def pack_scales(weights: Sequence[Fp8Weight], rows: int, upload: Uploader) -> tuple[Tensor, Tensor]:
    """(scales [scale rows, ⌈K / 128⌉], which row of them each of `rows` outputs uses)."""
    blocks = cdiv(weights[0].shape[1], BLOCK)
    scale = torch.empty(sum(len(w.scale) for w in weights), blocks, dtype=torch.float32, device=upload.device)
    index, first = [], 0
    for weight in weights:
        upload(weight.scale, scale[first : first + len(weight.scale)])
        index.append(first + torch.arange(weight.shape[0]) // BLOCK)
        first += len(weight.scale)
    scale_rows = torch.zeros(rows, dtype=torch.int32, device=upload.device)
    chosen = torch.cat(index).to(torch.int32)
    upload(chosen, scale_rows[: len(chosen)])
    return scale, scale_rows


class TritonExpertBank(ExpertBank):
    """Experts in device memory, one allocation per slot, reached through tables of addresses.

    All experts of a bank are stored alike: FP8 with block scales, or bfloat16/float32 as the first one is. `gate_up` is
    gate above up.
    """

    def __init__(self, slots: int, hidden: int, inner: int, dtype: torch.dtype, upload: Uploader):
        self.hidden, self.inner, self.dtype = hidden, inner, dtype
        self._upload = upload
        self._slots: list[tuple[PackedMatrix, PackedMatrix] | None] = [None] * slots
        # Addresses by slot: gate_up, its scales, down, its scales. 0: empty.
        self.tables = torch.zeros(4, slots, dtype=torch.int64, device=upload.device)

    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        self._check(slot)
        check_expert(gate, up, down, self.hidden, self.inner)
        self.drop(slot)
        kind = self.weight_dtype
        weights = [gate, up, down]
        if not all(isinstance(w, Fp8Weight) for w in weights):
            if kind == E4M3:
                raise ValueError(f"this bank's experts are FP8; slot {slot} was given {[w.name for w in weights]}")
            gate, up, down = (PlainWeight(w.dequantise(self.dtype)) for w in weights)
        packed = (
            pack([gate, up], self.dtype, self._upload, splits=False),
            pack([down], self.dtype, self._upload, splits=False),
        )
        if kind is not None and packed[0].data.dtype != kind:
            raise ValueError(f"this bank's experts are {kind}; slot {slot} was given {packed[0].data.dtype}")
        self._slots[slot] = packed
        self._publish(slot, [m.data_ptr() if m is not None else 0 for w in packed for m in (w.data, w.scale)])

    def drop(self, slot: int) -> None:
        self._check(slot)
        if self._slots[slot] is not None:
            self._publish(slot, [0, 0, 0, 0])
            self._slots[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for pair in self._slots if pair is not None for m in pair)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """float8_e4m3fn, bfloat16 or float32; None while every slot is empty."""
        held = self.example
        return None if held is None else held[0].data.dtype

    @property
    def example(self) -> tuple[PackedMatrix, PackedMatrix] | None:
        """Any expert that is held: strides, and which scales an output uses, are the same for all."""
        return next((pair for pair in self._slots if pair is not None), None)

    def empty(self, slots: list[int]) -> list[int]:
        return [s for s in slots if self._slots[s] is None]

    def _publish(self, slot: int, addresses: list[int]) -> None:
        self._upload(torch.tensor(addresses), self.tables[:, slot])
        self._upload.wait()  # another thread may compute on another stream

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"expert slot {slot} is not in 0 … {len(self._slots) - 1}")
