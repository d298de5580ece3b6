"""From the layouts that quantisers publish to weights that kernels compute with. What each tensor is stands in
cluster/model/formats, under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from isotherm.kernels.formats.grouped import INT4_ZERO, Int4Weight
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight

# e2m1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, §5.3.3).
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([_E2M1, -_E2M1]).to(torch.bfloat16)
# The numbers of a byte's low half and its high one, side by side in one word.
E2M1_PAIRS = torch.stack([E2M1.repeat(16), E2M1.repeat_interleave(16)], -1).view(torch.int32).flatten()
# E8M0: a power of two; 255 is NaN (ibid., §5.4.1). The largest is bfloat16's own.
E8M0 = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")]).to(torch.bfloat16)
MX_GROUP = 32  # inputs that share a power of two
AT_ONCE = 1 << 20  # numbers that are made at once: beside the result, what that takes is little


def pack_quantized(tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> StoredWeight:
    """compressed-tensors' pack-quantized: an int32 holds eight inputs of an output, the first in its lowest bits, which
    on a little-endian machine are the nibbles' own bytes."""
    rows, inputs = tensors["shape"].tolist()
    packed, group = tensors["packed"], parameters["group_size"]
    if tuple(packed.shape) != (rows, -(-inputs // 8)):
        raise ValueError(f"weight_shape is [{rows}, {inputs}], and weight_packed has shape {list(packed.shape)}")
    _check_order(tensors.get("index"), group)
    nibbles = packed.contiguous().view(torch.uint8)[:, : -(-inputs // 2)]
    zero = tensors.get("zero")
    zeros = None if zero is None else _zero_points(zero, rows)
    return Int4Weight(nibbles, tensors["scale"], _unless_all(zeros), group, inputs)


def _zero_points(zero: Tensor, rows: int) -> Tensor:
    """Packed along the outputs; or, as they were before April 2025, one by one, and signed where nibbles are not."""
    if zero.dtype != torch.int8:
        return unpacked_words(zero)[:rows]
    if len(beyond := zero[(zero < -INT4_ZERO) | (zero >= INT4_ZERO)]):
        raise ValueError(f"weight_zero_point has {int(beyond[0])}; it must be -8 to 7")
    return (zero + INT4_ZERO).to(torch.uint8)


def gptq(tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> StoredWeight:
    """GPTQ: the weight lies transposed, an int32 holds eight inputs; zero points are packed along the outputs, in the
    layout's first version less one each, so that 0 becomes 15."""
    packed, group = tensors["packed"], parameters["group_size"]
    rows = packed.shape[1]
    _check_order(tensors.get("index"), group)
    nibbles = packed.T.contiguous().view(torch.uint8)
    zeros = unpacked_words(tensors["zero"].T)[:rows] + parameters["zero_offset"] & 15
    return Int4Weight(nibbles, tensors["scale"].T.contiguous(), _unless_all(zeros), group)


def mxfp4(tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> StoredWeight:
    """In bfloat16, which has every product of an e2m1 number and a power of two but the four largest powers'."""
    packed, scale = tensors["packed"], E8M0[tensors["scale"].view(torch.uint8).int()]
    (rows, groups), inputs = scale.shape, 2 * packed.shape[1]
    if (len(packed), inputs) != (rows, groups * MX_GROUP):
        raise ValueError(
            f"has {inputs} inputs to each of {len(packed)} outputs, and scales of shape {[rows, groups]}; MXFP4 is "
            f"taken in whole groups of {MX_GROUP} inputs"
        )
    wide = torch.empty(rows, groups, MX_GROUP, dtype=torch.bfloat16)
    step = max(1, AT_ONCE // max(1, inputs))
    for part in (slice(begin, begin + step) for begin in range(0, rows, step)):
        pairs = E2M1_PAIRS.index_select(0, packed[part].flatten().int())
        numbers = pairs.view(torch.bfloat16).view(-1, groups, MX_GROUP)
        torch.mul(numbers, scale[part, :, None], out=wide[part])
    return PlainWeight(wide.flatten(1))


def unpacked_words(words: Tensor) -> Tensor:
    """int32 [R, G] → uint8 [8 R, G]: eight rows of each word, the first in its lowest bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None, :, None]
    return (words[:, None, :] >> shifts & 15).to(torch.uint8).flatten(0, 1)


def packed_words(nibbles: Tensor) -> Tensor:
    """Of Int4Weight: uint8 [N, ⌈K / 2⌉] → int32 [N, ⌈K / 8⌉], as pack_quantized reads them."""
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


def packed_zeros(zeros: Tensor) -> Tensor:
    """uint8 [N, G] → int32 [⌈N / 8⌉, G], as pack_quantized reads them."""
    by_eight = torch.nn.functional.pad(zeros, (0, 0, 0, -len(zeros) % 8)).view(-1, 8, zeros.shape[1]).int()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None, :, None]
    return (by_eight << shifts).sum(1, dtype=torch.int32)


def _unless_all(zeros: Tensor | None) -> Tensor | None:
    """None where every zero point is the one that a weight without zero points has."""
    return None if zeros is None or bool((zeros == INT4_ZERO).all()) else zeros.contiguous()


def _check_order(index: Tensor | None, group: int) -> None:
    if index is not None and not torch.equal(index.long(), torch.arange(len(index)) // group):
        raise ValueError("is quantised in act-order: its g_idx deals inputs out to groups in another order")


PUBLISHED: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], StoredWeight]] = {
    "pack-quantized": pack_quantized,
    "gptq": gptq,
    "mxfp4": mxfp4,
}
