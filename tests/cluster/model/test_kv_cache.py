"""Bytes of a row in the KV cache, and what fingerprints say of it."""

from __future__ import annotations

import pytest

from isotherm.cluster.model.kv_cache import dtype_words, latent_row_bytes
from isotherm.kernels.cache_rows import fp8_row_bytes


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize(("latent", "rotary"), [(512, 64), (33, 6), (3, 2)])
def test_rows_are_as_long_as_the_kernels_make_them(latent: int, rotary: int, element: int):
    assert latent_row_bytes(latent, rotary, element, "fp8") == fp8_row_bytes(latent, rotary, element)
    assert latent_row_bytes(latent, rotary, element, "auto") == (latent + rotary) * element


def test_fingerprints_of_those_that_do_not_use_it_are_what_they_were():
    assert dtype_words("bfloat16", "auto") == "bfloat16"
    assert dtype_words("bfloat16", "fp8") == "bfloat16 with a KV cache in fp8"
