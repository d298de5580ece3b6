"""Grouped integers as integers.py multiplies by them: [runs of RUN inputs, rows, RUN], so that what a tile reads lies
in one piece. Of int4 two runs share their bytes, the first in the low halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int8Weight

RUN = 32


def codes_by_run(weight: GroupedWeight, columns: int) -> Tensor:
    """uint8 [columns / 64, N, RUN] of int4, int8 [columns / 32, N, RUN] of int8; inputs are filled up to `columns`."""
    if isinstance(weight, Int8Weight):
        runs = pad(weight.data, (0, columns - weight.shape[1])).view(weight.shape[0], -1, RUN)
    else:
        codes = pad(cast(Int4Weight, weight).codes(), (0, columns - weight.shape[1]))
        first, second = codes.view(len(codes), -1, 2, RUN).unbind(2)
        runs = first | second << 4
    return runs.transpose(0, 1)


def scale_dtype(weights: Sequence[GroupedWeight]) -> torch.dtype:
    """The narrowest that has all their scales exactly."""
    narrow = (d for d in (torch.bfloat16, torch.float16) if all(_fit(w.scales, d) for w in weights))
    return next(narrow, torch.float32)


def by_group(values: Tensor, group: int, columns: int) -> Tensor:
    """[N, groups] → [columns / group, N], filled up with zeros."""
    return pad(values, (0, columns // group - values.shape[1])).T


def _fit(scales: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(scales.to(dtype).float(), scales)
