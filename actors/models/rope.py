"""Cosine and sine tables of rotary position embedding, plain and YaRN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isotherm.cluster.model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """float32 [dim / 2]. Under YaRN (arXiv:2309.00071, §3.2) high frequencies are kept, low ones divided by the factor,
    with a linear ramp between the dimensions that turn beta_fast and beta_slow times over the original context."""
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.yarn_factor is None:
        return 1.0 / powers

    def dimension_that_turns(times: float) -> float:
        return dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_that_turns(rope.beta_fast or 32.0), dimension_that_turns(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # avoids 0/0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.yarn_factor * powers) * (1 - keep) + 1.0 / powers * keep


def rope_tables(rope: RopeConfig, dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, dim / 2] each, times YaRN's magnitude. Made once, so that a position's values
    never depend on a batch."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(rope, dim)[None]
    return angles.cos() * rope.magnitude, angles.sin() * rope.magnitude
