"""Weights as the kernels read them, and the expert bank.

A packed matrix keeps its stored width (FP8 stays FP8, int4 stays int4) with rows padded to a multiple of ROW_PAD and
columns to one of COLUMN_PAD, so that tiles need no mask and every row starts on 16 bytes. FP8 scales keep one value per
128×128 block; `scale_rows` [padded rows] says which row of scales an output uses, since parts that stand side by side
need not be multiples of 128. Grouped integers lie as integer_weights.py says.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.kernels.checked import check_expert, check_weights
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.formats.fp8 import BLOCK, E4M3, Fp8Weight
from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int6Weight, Int8Weight, alike
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.triton.integer_weights import RUN, by_group, codes_by_run, scale_dtype
from isotherm.kernels.triton.launch import cdiv

KEPT: set[type[StoredWeight]] = {Fp8Weight, Int4Weight, Int6Weight, Int8Weight}  # multiplied as they are stored
ROW_PAD, COLUMN_PAD = 128, 128
SPLIT_PROGRAMS = 132  # multiprocessors of a full Hopper GPU. A constant: the bits depend on it
EMPTY = -1  # in a bank's table of forms
STAGING_BYTES = 64 << 20
SPLIT_TILE, SPLIT_LEAST = 64, 512  # outputs of a small tile; the least of K that is worth a program of its own


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for: dtypes of a packed matrix and of its scales, inputs that share one (0 where they
    aren't integers), and whether there are zero points."""

    data: torch.dtype
    scale: torch.dtype | None
    group: int
    zeros: bool


@dataclass(frozen=True)
class PackedMatrix:
    """`data` [rows, columns], padded. For FP8 `scale` float32 [scale rows, columns / 128] and `scale_rows` int32
    [rows]. For integers `data` [runs, rows, RUN], `scale` and `zeros` [columns / group, rows].

    K is summed in `splits` parts of `k_split`, fixed by the shape alone.
    """

    data: Tensor
    scale: Tensor | None
    k_split: int
    splits: int
    scale_rows: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0

    @property
    def fp8(self) -> bool:
        return self.scale_rows is not None

    @property
    def scaled(self) -> int:
        """Inputs that share a scale; 0 for none."""
        return BLOCK if self.fp8 else self.group

    @property
    def form(self) -> Form:
        return Form(
            self.data.dtype, None if self.scale is None else self.scale.dtype, self.group, self.zeros is not None
        )

    @property
    def stride_scale(self) -> int:
        return 0 if self.scale is None else self.scale.stride(0)

    @property
    def addresses(self) -> list[int]:
        """Of data, scales and zero points; 0 for none."""
        return [0 if t is None else t.data_ptr() for t in (self.data, self.scale, self.zeros)]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scale, self.scale_rows, self.zeros) if t is not None)


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


def as_kept(weights: Sequence[StoredWeight], dtype: torch.dtype) -> Sequence[StoredWeight]:
    """The weights as the kernels multiply by them: as they are stored where all are FP8 or integers, else the
    numbers."""
    formats = {type(w) for w in weights}
    return weights if len(formats) == 1 and formats <= KEPT else [w.plain(dtype) for w in weights]


def pack(weights: Sequence[StoredWeight], dtype: torch.dtype, upload: Uploader, splits: bool = True) -> PackedMatrix:
    """Weights one above the other. What is not kept as it is stored is converted to `dtype`, but for bfloat16, which
    float32 kernels widen in registers."""
    outputs, inputs = check_weights(weights)
    rows, columns = cdiv(outputs, ROW_PAD) * ROW_PAD, cdiv(inputs, COLUMN_PAD) * COLUMN_PAD
    kept = as_kept(weights, dtype)
    k_split, parts = k_splits(outputs, inputs) if splits else (columns, 1)
    if integers := [w for w in kept if isinstance(w, GroupedWeight)]:
        return _pack_integers(alike(integers), rows, columns, upload, k_split, parts)
    fp8 = [w for w in kept if isinstance(w, Fp8Weight)]
    tensors = [w.tensors[0] for w in kept]
    # FP8 as bytes, because copying float8 to a padded place is not offered for every device.
    width = torch.uint8 if fp8 else torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors) else dtype
    data = torch.zeros(rows, columns, dtype=width, device=upload.device)
    place = 0
    for tensor in tensors:
        upload(tensor.view(torch.uint8) if fp8 else tensor, data[place : place + len(tensor), :inputs])
        place += len(tensor)
    if not fp8:
        return PackedMatrix(data, None, k_split, parts)
    scale, scale_rows = pack_scales(fp8, rows, upload)
    return PackedMatrix(data.view(E4M3), scale, k_split, parts, scale_rows)


def _pack_integers(
    weights: Sequence[GroupedWeight], rows: int, columns: int, upload: Uploader, k_split: int, parts: int
) -> PackedMatrix:
    group, device = weights[0].group, upload.device
    in_bytes = isinstance(weights[0], Int8Weight)  # else two codes are a byte
    dtype, runs = (torch.int8, columns // RUN) if in_bytes else (torch.uint8, columns // (2 * RUN))
    if runs * rows * RUN >= 2**31:
        raise ValueError(f"a weight of {runs * rows * RUN} bytes of integers; kernels address fewer than 2³¹")
    data = torch.zeros(runs, rows, RUN, dtype=dtype, device=device)
    scale = torch.zeros(columns // group, rows, dtype=scale_dtype(weights), device=device)
    zeros = None if weights[0].zeros is None else torch.zeros(columns // group, rows, dtype=torch.uint8, device=device)
    place = 0
    for weight in weights:
        mine = slice(place, place + weight.shape[0])
        upload(codes_by_run(weight, columns), data[:, mine])
        upload(by_group(weight.scales, group, columns), scale[:, mine])
        if zeros is not None and weight.zeros is not None:
            upload(by_group(weight.zeros, group, columns), zeros[:, mine])
        place = mine.stop
    return PackedMatrix(data, scale, k_split, parts, zeros=zeros, group=group)


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


@dataclass
class Variant:
    """Experts of a bank that are stored alike: `id` in the bank's table of forms, one of them, and how many."""

    id: int
    example: tuple[PackedMatrix, PackedMatrix]
    count: int = 0


class TritonExpertBank(ExpertBank):
    """Experts in device memory, one allocation per slot, reached through tables of addresses. `gate_up` is gate above
    up. Each form that experts are stored in is computed with by launches of its own."""

    def __init__(self, slots: int, hidden: int, inner: int, dtype: torch.dtype, upload: Uploader):
        self.hidden, self.inner, self.dtype = hidden, inner, dtype
        self._upload = upload
        self._slots: list[tuple[PackedMatrix, PackedMatrix] | None] = [None] * slots
        self._variants: dict[tuple[Form, Form], Variant] = {}
        # By slot: addresses of gate_up, its scales, its zero points, and the same of down.
        self.tables = torch.zeros(6, slots, dtype=torch.int64, device=upload.device)
        self.forms = torch.full((slots,), EMPTY, dtype=torch.int64, device=upload.device)  # ids of variants
        self.variants: tuple[Variant, ...] = ()

    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        self._check(slot)
        check_expert(gate, up, down, self.hidden, self.inner)
        self.drop(slot)
        gate, up, down = as_kept([gate, up, down], self.dtype)
        packed = (
            pack([gate, up], self.dtype, self._upload, splits=False),
            pack([down], self.dtype, self._upload, splits=False),
        )
        self._slots[slot] = packed
        key = packed[0].form, packed[1].form
        if key not in self._variants:
            taken = {v.id for v in self._variants.values()}
            self._variants[key] = Variant(next(i for i in range(len(self._slots)) if i not in taken), packed)
        variant = self._variants[key]
        variant.count += 1
        self.variants = tuple(self._variants.values())
        self._publish(slot, variant.id, packed[0].addresses + packed[1].addresses)

    def drop(self, slot: int) -> None:
        self._check(slot)
        if (packed := self._slots[slot]) is None:
            return
        self._publish(slot, EMPTY, [0] * len(self.tables))
        self._slots[slot] = None
        variant = self._variants[key := (packed[0].form, packed[1].form)]
        variant.count -= 1
        if not variant.count:
            del self._variants[key]
            self.variants = tuple(self._variants.values())
        elif variant.example is packed:
            others = (p for p in self._slots if p is not None)
            variant.example = next(p for p in others if (p[0].form, p[1].form) == key)

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for pair in self._slots if pair is not None for m in pair)

    def empty(self, slots: list[int]) -> list[int]:
        return [s for s in slots if self._slots[s] is None]

    def _publish(self, slot: int, form: int, addresses: list[int]) -> None:
        self._upload(torch.tensor(addresses), self.tables[:, slot])
        self._upload(torch.tensor([form]), self.forms[slot : slot + 1])
        self._upload.wait()  # another thread may compute on another stream

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._slots):
            raise IndexError(f"expert slot {slot} is not in 0 … {len(self._slots) - 1}")
