"""In what the KV cache is kept, and how many bytes a token's row of latent attention takes in it. Pure."""

from __future__ import annotations

from typing import Literal

KvCacheDtype = Literal["auto", "fp8"]  # auto: in the dtype of activations


def latent_row_bytes(latent: int, rotary: int, element: int, kept: KvCacheDtype) -> int:
    """`element`: bytes of an activation. In FP8 a row is what isotherm/kernels/cache_rows.py says: the latent's codes
    beside the rotary key and a scale, which are activations."""
    return element * (latent + rotary if kept == "auto" else rotary + 1 + -(-latent // element))


def dtype_words(dtype: str, kept: KvCacheDtype) -> str:
    """Of activations and KV cache, for fingerprints."""
    return dtype if kept == "auto" else f"{dtype} with a KV cache in {kept}"
