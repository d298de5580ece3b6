"""Rounding to integers of four, six and eight bits, with one scale for a group of numbers. To four bits the scale of
each group is the one, of those that are tried, that loses least.

This states which bits come out; where there are native kernels, kernels/native/rounding.py computes them. The same
numbers give the same codes on every machine: whatever is added up is added by halves, elementwise, so that no vector
width, thread count or fused multiply-add can change a sum, and with it a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
LARGEST_INT6, LARGEST_INT8 = 31, 127
# Of a float32's 23 bits after the point. For codes of four bits a scale of so few, chosen as here, loses 1 % more than
# a bfloat16 one (of the root of the squares), and with sign and exponent it is a byte wherever the scales of a weight
# lie within eight powers of two: 4.25 bits for a number instead of 4.5.
INT4_SCALE_BITS, SCALE_BITS = 4, 7
# To what the number that lies farthest from 0 is mapped, on the side of LOWEST; beyond it, it is cut off.
REACHES = (8.0, 7.2, 7.6, 8.4, 8.8)
BLOCK_REACHES = (8.0, 8.8, 9.6, 10.4, 11.2)  # of 32 × 32 numbers, whose farthest lies farther out
CHUNK = 1 << 14  # numbers at once: they stay in the processor's cache, and torch does not share them out to threads


def nearest_int4(groups: Tensor, reaches: Sequence[float] = REACHES) -> tuple[Tensor, Tensor]:
    """float32 [M, group] → codes int8 [M, group], LOWEST … HIGHEST, and scales [M], float32 of INT4_SCALE_BITS after
    the point, or of SCALE_BITS where nothing is lost: number ≈ code × scale. `group`: a power of two. Scales may be
    negative. Raises ValueError for what is not finite."""
    codes = torch.empty(groups.shape, dtype=torch.int8)
    scales = torch.empty(len(groups))
    step = max(1, CHUNK // groups.shape[1])
    for begin in range(0, len(groups), step):
        part = slice(begin, begin + step)
        found, scales[part] = _nearest(groups[part].T.contiguous(), reaches)
        codes[part] = found.T
    if not bool(scales.isfinite().all()):  # as they are of finite numbers, the largest float32 among them
        raise ValueError("has numbers that are not finite")
    return codes, scales


def nearest_symmetric(groups: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """float32 [M, group] → codes int8 [M, group], -largest … largest, and scales [M], float32 that are bfloat16
    numbers: the largest of each group becomes `largest`. Where one is not finite its scale is not either."""
    scales = as_scale(groups.abs().amax(1) / largest, SCALE_BITS)
    codes = (groups / scales[:, None]).round_().clamp_(-largest, largest)
    return codes.nan_to_num_(0.0).to(torch.int8), scales


def _nearest(x: Tensor, reaches: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Of columns [group, M]. After the reaches the scale that fits the best codes best, by least squares, is tried; and
    with more bits where nothing is lost then, as of numbers that had four bits before."""
    highest, lowest = x.amax(0), x.amin(0)
    farthest = torch.where(highest > -lowest, highest, lowest)
    best_scale = as_scale(farthest / -reaches[0], INT4_SCALE_BITS)
    best_codes, least = _loss(x, best_scale)
    for reach in reaches[1:]:
        tried = as_scale(farthest / -reach, INT4_SCALE_BITS)
        best_codes, best_scale, least = _better(x, tried, best_codes, best_scale, least)
    fit = sum_by_halves(x * best_codes) / sum_by_halves(best_codes * best_codes).clamp(min=1)
    best_codes, best_scale, least = _better(x, as_scale(fit, INT4_SCALE_BITS), best_codes, best_scale, least)
    longer = as_scale(fit, SCALE_BITS)
    tried, loss = _loss(x, longer)
    whole = (loss == 0) & (least > 0)
    return torch.where(whole, tried, best_codes).to(torch.int8), torch.where(whole, longer, best_scale)


def _better(x: Tensor, scale: Tensor, codes: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With `scale` where it loses less than the best so far."""
    tried, loss = _loss(x, scale)
    wins = loss < least
    return torch.where(wins, tried, codes), torch.where(wins, scale, best), torch.where(wins, loss, least)


def _loss(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the sum of the squares of what they miss."""
    codes = (x / scale).round_().clamp_(LOWEST, HIGHEST)
    missed = (codes * scale).sub_(x)
    return codes, sum_by_halves(missed.square_())


def sum_by_halves(x: Tensor) -> Tensor:
    """[2^n, M] → [M], in one order whatever the machine."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x[0]


def as_scale(scale: Tensor, kept: int) -> Tensor:
    """float32, rounded to so many bits after the point, half to even, and 1 where it would be 0: the codes are 0
    then."""
    left = 23 - kept
    bits = scale.view(torch.int32)
    rounded = ((bits + ((1 << left - 1) - 1) + (bits >> left & 1)) & -(1 << left)).view(torch.float32)
    return torch.where(scale.isnan(), scale, torch.where(rounded == 0, 1.0, rounded))
