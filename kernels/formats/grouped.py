"""Integers with one scale for each group of inputs of an output: four bits (int4), six (int6) and eight (int8).

Scales are float32 here; those that a checkpoint stores in 16 bits keep their exact values, and kernels may keep them in
16 bits again where that loses nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.rounding import BLOCK_REACHES, LARGEST_INT6, LARGEST_INT8, nearest_int4, nearest_symmetric
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.native.rounding import DTYPES, GROUP, native_rounding

if TYPE_CHECKING:
    from typing_extensions import Self

GROUPS = (32, 64, 128)
INT4_ZERO = 8  # the code that stands for 0 where a weight has no zero points


class GroupedWeight(StoredWeight):
    """`scales` float32 [N, ⌈K / group⌉]: weight = integer × scale of its output and group."""

    scales: Tensor
    zeros: Tensor | None = None
    group: int

    def _take_scales(self, scales: Tensor, group: int) -> None:
        if group not in GROUPS:
            raise ValueError(f"{self.name} weights have groups of {group} inputs; it must be one of {GROUPS}")
        self.scales, self.group = scales.float(), group
        self._check_groups("scales", self.scales)

    def _check_groups(self, what: str, tensor: Tensor) -> None:
        rows, columns = self.shape
        if tuple(tensor.shape) != (needed := (rows, -(-columns // self.group))):
            raise ValueError(
                f"{what} have shape {tuple(tensor.shape)}; an {self.name} weight ({rows}, {columns}) in groups of "
                f"{self.group} needs {needed}"
            )

    def can_cut(self, row: int) -> bool:
        return True

    @abstractmethod
    def regrouped(self, group: int, zeros: bool) -> GroupedWeight:
        """The same numbers in groups of `group`, which divides its own; with zero points where `zeros`."""

    def _finer(self, tensor: Tensor, group: int) -> Tensor:
        """A value for each group → one for each of those that `group` cuts it into."""
        return tensor.repeat_interleave(self.group // group, 1)[:, : -(-self.shape[1] // group)]

    def _spread(self, tensor: Tensor) -> Tensor:
        """A value for each group → one for each input."""
        return tensor.repeat_interleave(self.group, 1)[:, : self.shape[1]]


class Int4Weight(GroupedWeight):
    """Weight = (nibble - zero) × scale. `nibbles` uint8 [N, ⌈K / 2⌉], that of the even input in the low half; `zeros`
    uint8 [N, ⌈K / group⌉], or None where each is INT4_ZERO. `inputs`: K, where it is odd."""

    name = "int4"

    def __init__(
        self,
        nibbles: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        group: int = GROUP,
        inputs: int | None = None,
    ):
        if nibbles.dtype != torch.uint8 or nibbles.dim() != 2:
            raise TypeError(
                f"an int4 weight is {nibbles.dtype} {tuple(nibbles.shape)}; [N, K / 2] in {torch.uint8} is needed"
            )
        self.inputs = 2 * nibbles.shape[1] if inputs is None else inputs
        if -(-self.inputs // 2) != nibbles.shape[1]:
            raise ValueError(
                f"an int4 weight has {nibbles.shape[1]} bytes a row; {self.inputs} inputs need half of that"
            )
        self.nibbles = nibbles
        self._take_scales(scales, group)
        self.zeros = zeros
        if zeros is not None:
            if zeros.dtype != torch.uint8:
                raise TypeError(f"zero points of an int4 weight are {zeros.dtype}; {torch.uint8} is needed")
            self._check_groups("zero points", zeros)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> Int4Weight:
        """Roles: nibbles, scales and, where there are zero points, zeros."""
        return cls(
            tensors["nibbles"], tensors["scales"], tensors.get("zeros"), parameters["group"], parameters.get("inputs")
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.nibbles.shape[0], self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.nibbles, self.scales) if self.zeros is None else (self.nibbles, self.scales, self.zeros)

    def codes(self) -> Tensor:
        """uint8 [N, K]: 0 … 15."""
        return torch.stack([self.nibbles & 15, self.nibbles >> 4], -1).flatten(1)[:, : self.inputs]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        zeros = float(INT4_ZERO) if self.zeros is None else self._spread(self.zeros).float()
        return ((self.codes().float() - zeros) * self._spread(self.scales)).to(dtype)

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> Int4Weight:
        """As they are stored."""
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return Int4Weight(self.nibbles[begin:end], self.scales[begin:end], zeros, self.group, self.inputs)

    def regrouped(self, group: int, zeros: bool) -> Int4Weight:
        points = torch.full_like(self.scales, INT4_ZERO, dtype=torch.uint8) if self.zeros is None else self.zeros
        return Int4Weight(
            self.nibbles, self._finer(self.scales, group), self._finer(points, group) if zeros else None, group,
            self.inputs,
        )  # fmt: skip

    def transpose(self, dtype: torch.dtype) -> StoredWeight:
        """As it is stored where the rows of each group of rows are scaled alike (`quantise_both_ways`)."""
        rows, of_groups = self.shape[0], self.tensors[1:]  # scales, and zero points where there are any
        firsts = [tensor[:: self.group] for tensor in of_groups]
        alike = (f.repeat_interleave(self.group, 0)[:rows] for f in firsts)
        if not all(map(torch.equal, alike, of_groups)):
            return super().transpose(dtype)
        scales, *zeros = (self._spread(f).T for f in firsts)
        return Int4Weight(pack_nibbles(self.codes().T), scales, zeros[0] if zeros else None, self.group, rows)

    @classmethod
    def quantise_both_ways(cls, weight: StoredWeight, turned: int, cycle: int) -> Int4Weight:
        """As `quantise`, but the first `turned` of every `cycle` rows have one scale for GROUP rows × GROUP inputs, so
        that their transpose consists of groups as well."""
        if isinstance(weight, Int4Weight):
            return weight
        numbers = weight.dequantise(torch.float32).view(-1, cycle, weight.shape[1])
        rest = cls.quantise(PlainWeight(numbers[:, turned:].flatten(0, 1)))
        nibbles, scales = (
            torch.cat([block, other.view(len(block), -1, other.shape[1])], 1).flatten(0, 1)
            for block, other in zip(_nearest_blocks(numbers[:, :turned]), rest.tensors, strict=True)
        )
        return cls(nibbles, scales, None, GROUP, weight.shape[1])

    @classmethod
    def quantise(cls, weight: StoredWeight) -> Int4Weight:
        """Groups of GROUP, without zero points, each with the scale that loses least of those that are tried. Scales
        are bfloat16 numbers."""
        if isinstance(weight, Int4Weight):
            return weight
        if (native := native_rounding()) is not None:
            nibbles, scales = native.int4(_numbers(weight), weight.shape)
        else:
            groups = _groups(weight)
            codes, scales = nearest_int4(groups.flatten(0, 1))
            codes = (codes + INT4_ZERO).to(torch.uint8).view(len(groups), -1)[:, : weight.shape[1]]
            nibbles, scales = pack_nibbles(codes), scales.view(len(groups), -1)
        return cls(nibbles, scales, None, GROUP, weight.shape[1])


class Int8Weight(GroupedWeight):
    """`data` int8 [N, K], -127 … 127."""

    name, bits, largest = "int8", 8, LARGEST_INT8

    def __init__(self, data: Tensor, scales: Tensor, group: int = GROUP):
        if data.dtype != torch.int8 or data.dim() != 2:
            raise TypeError(
                f"an {self.name} weight is {data.dtype} {tuple(data.shape)}; [N, K] in {torch.int8} is needed"
            )
        if data.numel() and (int(data.min()) < -self.largest or int(data.max()) > self.largest):
            raise ValueError(
                f"an {self.name} weight has a code of {int(data.min())} or {int(data.max())}; they are symmetric, "
                f"-{self.largest} … {self.largest}"
            )
        self.data = data
        self._take_scales(scales, group)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> Self:
        """Roles: data and scales."""
        return cls(tensors["data"], tensors["scales"], parameters["group"])

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.data, self.scales

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return (self.data.float() * self._spread(self.scales)).to(dtype)

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> Self:
        """As they are stored."""
        return type(self)(self.data[begin:end], self.scales[begin:end], self.group)

    def regrouped(self, group: int, zeros: bool) -> Self:
        return type(self)(self.data, self._finer(self.scales, group), group)

    @classmethod
    def quantise(cls, weight: StoredWeight) -> Self:
        """Groups of GROUP: the largest of each becomes `largest`. Scales are bfloat16 numbers."""
        if type(weight) is cls:
            return weight
        if (native := native_rounding()) is not None:
            return cls(*native.in_bytes(cls.bits, _numbers(weight), weight.shape))
        groups = _groups(weight)
        codes, scales = nearest_symmetric(groups.flatten(0, 1), cls.largest)
        codes = codes.view(len(groups), -1)[:, : weight.shape[1]].contiguous()
        return cls(codes, scales.view(len(groups), -1))


class Int6Weight(Int8Weight):
    """`data` int8 [N, K], -31 … 31. Native kernels keep them in six bits, Triton in eight."""

    name, bits, largest = "int6", 6, LARGEST_INT6


def alike(weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
    """The same numbers, all in groups of one size, and all with zero points or none."""
    group, zeros = min(w.group for w in weights), any(w.zeros is not None for w in weights)
    kept = [w.group == group and (w.zeros is not None) == zeros for w in weights]
    return [w if same else w.regrouped(group, zeros) for w, same in zip(weights, kept, strict=True)]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K], 0 … 15 → [N, ⌈K / 2⌉] as Int4Weight has them."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def _numbers(weight: StoredWeight) -> Sequence[Tensor]:
    """What native rounding reads: the tensors of a weight that it knows, else the numbers that it stands for."""
    if isinstance(weight, Fp8Weight) or (isinstance(weight, PlainWeight) and weight.data.dtype in DTYPES):
        return weight.tensors
    return (weight.dequantise(torch.float32),)


def _nearest_blocks(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [M, N, K] → nibbles [M, N, ⌈K / 2⌉] and scales [M, N, ⌈K / GROUP⌉] of int4 weights, in which GROUP rows ×
    GROUP inputs share a scale."""
    many, rows, inputs = numbers.shape
    padded = torch.nn.functional.pad(numbers, (0, -inputs % GROUP, 0, -rows % GROUP))
    blocks = padded.view(many, -(-rows // GROUP), GROUP, -(-inputs // GROUP), GROUP).transpose(2, 3)
    found, scales = nearest_int4(blocks.flatten(3).flatten(0, 2), BLOCK_REACHES)
    codes = found.view(blocks.shape).transpose(2, 3).reshape(padded.shape)[:, :rows, :inputs]
    nibbles = pack_nibbles((codes + INT4_ZERO).to(torch.uint8).flatten(0, 1)).view(many, rows, -1)
    return nibbles, scales.view(many, *blocks.shape[1:3]).repeat_interleave(GROUP, 1)[:, :rows]


def _groups(weight: StoredWeight) -> Tensor:
    """float32 [N, ⌈K / GROUP⌉, GROUP], filled up with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.dequantise(torch.float32), (0, -columns % GROUP))
    return padded.view(rows, -1, GROUP)
