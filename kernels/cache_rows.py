"""A token's row in the KV cache of a layer: its latent and its rotary key, as they are or with the latent in FP8.

An FP8 row is bytes: the rotary key [R] and a scale in the activations' dtype, then an e4m3 code for each of the
latent's C values, then a byte where that would give no whole number of values. Positions stay exact so, as they do in
DeepSeek's own kernels (FlashMLA's FP8 cache).

The scale is a power of two, the least one by which the codes, up to 448, reach the latent's largest magnitude. So code
× scale is a number of the activations' dtype, bfloat16 too, without another rounding: whatever reads a row computes
with the very same latent, in whatever order it multiplies. What a power of two costs is one of e4m3's 17 binades, at
the small end; the others keep their relative precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_EXPONENT = -100  # of a scale: codes × 2^-100 are normal numbers
NAN_CODE = 0x7F


def fp8_row_bytes(latent: int, rotary: int, element: int) -> int:
    """`element`: bytes of a value of the activations' dtype."""
    return element * (rotary + 1 + -(-latent // element))


def new_layer_cache(
    blocks: int, block_size: int, latent: int, rotary: int, dtype: torch.dtype, device: torch.device, fp8: bool
) -> Tensor:
    """Zeroed [blocks, block_size, C + R] in `dtype`, or uint8 [blocks, block_size, bytes of an FP8 row]."""
    if fp8:
        width = fp8_row_bytes(latent, rotary, dtype.itemsize)
        return torch.zeros(blocks, block_size, width, dtype=torch.uint8, device=device)
    return torch.zeros(blocks, block_size, latent + rotary, dtype=dtype, device=device)


def is_fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.uint8


def quantise(latent_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [T, C], rounded to nearest even, and scales float32 [T]. A row with a value that is not finite is
    NaN altogether."""
    x = latent_TC.float()
    # Of magnitudes, the bits are in the order of the values; those that are not finite come last.
    largest_T = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    exponent_T = (largest_T >> 23) - 127 - 8 + ((largest_T & 0x7FFFFF) > 0x600000).int()  # 448 = 1.75 × 2^8
    finite_T = largest_T < 0x7F800000
    scale_T = _power_of_two(torch.where(finite_T, exponent_T.clamp(min=LEAST_EXPONENT), 0))
    codes = (x / scale_T[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(finite_T[:, None], codes, NAN_CODE), scale_T


def fp8_rows(latent_TC: Tensor, k_rope_TR: Tensor) -> Tensor:
    """Rows as they are stored, uint8 [T, bytes]."""
    codes, scale_T = quantise(latent_TC)
    values = torch.cat([k_rope_TR, scale_T[:, None].to(k_rope_TR.dtype)], -1)
    padding = -codes.shape[1] % values.element_size()
    return torch.cat([values.view(torch.uint8), torch.nn.functional.pad(codes, (0, padding))], -1)


def read_rows(rows: Tensor, latent: int, rotary: int, dtype: torch.dtype) -> Tensor:
    """Rows [..., C + R] in `dtype` of such ones, and of [..., bytes] as they are stored in FP8."""
    if not is_fp8(rows):
        return rows
    begin = (rotary + 1) * dtype.itemsize
    values = rows[..., :begin].contiguous().view(dtype)
    codes = rows[..., begin : begin + latent].contiguous().view(torch.float8_e4m3fn)
    return torch.cat([codes.to(dtype) * values[..., rotary:], values[..., :rotary]], -1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32, exactly."""
    return ((exponent.int() + 127) << 23).view(torch.float32)
