"""Decoder layers in one native call: the same bits as their operations one by one, and what is refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from native_cases import LATENT, ROTARY, WIDTH, attention_rows, attention_weights, native, runnable
from weight_cases import BF16, F32, filled_banks, randn, stored

from isotherm.kernels.cache_rows import new_layer_cache
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import DecoderLayer, Kernels, Router

CPU = torch.device("cpu")
EXPERTS, INNER = 8, 64


@pytest.fixture(scope="module", params=[(isa, dtype) for isa in runnable() for dtype in (BF16, F32)], ids=str)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    isa, dtype = request.param
    return native(dtype, 2, isa)


def router() -> Router:
    return Router(randn(EXPERTS, WIDTH, seed=1, scale=0.1), randn(EXPERTS, seed=2, scale=0.1), 4, 2, 3, True, 2.5)


def dense(kernels: NativeKernels, kind: str, inner: int = 96) -> DecoderLayer:
    gate_up = kernels.pack_linear([stored(inner, WIDTH, kind, i) for i in (3, 4)])
    down = kernels.pack_linear([stored(WIDTH, inner, kind, 5)])
    return DecoderLayer(attention_weights(kernels, kind, 40, True), gate_up, down)


def of_experts(kernels: NativeKernels, kind: str, shared: int | None) -> DecoderLayer:
    (bank,) = filled_banks([kernels], EXPERTS + 1, WIDTH, INNER, kind)
    own = (None, None)
    if shared:
        of_dense = dense(kernels, kind, shared)
        own = of_dense.gate_up, of_dense.down
    slots = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4], dtype=torch.int32)
    return DecoderLayer(attention_weights(kernels, kind, None, False), *own, router(), bank, slots)


def caches(kernels: NativeKernels, blocks: int, count: int, fp8: bool = False) -> list[torch.Tensor]:
    made = [new_layer_cache(blocks, 4, LATENT, ROTARY, kernels.dtype, CPU, fp8) for _ in range(count)]
    if not fp8:
        for i, cache in enumerate(made):
            cache.copy_(randn(*cache.shape, seed=20 + i, dtype=kernels.dtype))
    return made


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("form", ["DMS", "M", "DDSM", "D"])  # dense, experts alone, with a shared one
@pytest.mark.parametrize(("decodes", "chunks"), [([9], []), ([300, 2], [(0, 5), (8, 30)])])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain-cache", "fp8-cache"])
def test_layers_in_one_call_equal_their_operations(
    kernels: NativeKernels, kind: str, form: str, decodes: list[int], chunks: list[tuple[int, int]], fp8: bool
) -> None:
    make = {
        "D": lambda: dense(kernels, kind),
        "M": lambda: of_experts(kernels, kind, None),
        "S": lambda: of_experts(kernels, kind, INNER),
    }
    layers = [make[letter]() for letter in form]
    rows, blocks = attention_rows(decodes, chunks)
    out = []
    for decoder in (NativeKernels.decoder, Kernels.decoder):
        x = randn(len(rows.cache_slots), WIDTH, seed=7, dtype=kernels.dtype)
        held = caches(kernels, blocks, len(layers), fp8)
        out.append((decoder(kernels, x, layers, rows, held), *held))
    assert all(torch.equal(one, other) for one, other in zip(*out, strict=True))
    assert not torch.equal(out[0][0], randn(len(rows.cache_slots), WIDTH, seed=7, dtype=kernels.dtype))


def test_experts_that_move_are_followed(kernels: NativeKernels) -> None:
    """Slots that change in place are seen at the next call, and other caches too."""
    layers = [of_experts(kernels, "bf16", None)]
    rows, blocks = attention_rows([5, 2], [])

    def check(held: list[torch.Tensor]) -> torch.Tensor:
        x = randn(2, WIDTH, seed=7, dtype=kernels.dtype)
        one, other = (
            decoder(kernels, x.clone(), layers, rows, [cache.clone() for cache in held] if plain else held)
            for plain, decoder in ((True, Kernels.decoder), (False, NativeKernels.decoder))
        )
        assert torch.equal(one, other)
        return other

    held = caches(kernels, blocks, 1)
    first = check(held)
    assert layers[0].slot_of_E is not None
    layers[0].slot_of_E.copy_(layers[0].slot_of_E.flip(0).clone())
    second = check(held)
    assert not torch.equal(first, second)
    held[0] = held[0] * 0.5
    assert not torch.equal(check(held), second)


def test_kernels_keep_no_layer_and_no_cache_alive(kernels: NativeKernels) -> None:
    """Nor their memory: kernels may outlive the engines that they computed for."""
    layers = [of_experts(kernels, "bf16", None), dense(kernels, "bf16")]
    rows, blocks = attention_rows([5], [])
    held = caches(kernels, blocks, 2)
    kernels.decoder(randn(1, WIDTH, seed=7, dtype=kernels.dtype), layers, rows, held)
    seen = [weakref.ref(one) for one in (*layers, *held)]
    del layers, held
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4


def test_what_does_not_fit_is_refused(kernels: NativeKernels) -> None:
    rows, blocks = attention_rows([5], [(0, 3)])
    x = randn(4, WIDTH, seed=7, dtype=kernels.dtype)
    layer, plain = of_experts(kernels, "bf16", None), dense(kernels, "bf16")

    def compute(layers: list[DecoderLayer], held: list[torch.Tensor]) -> None:
        kernels.decoder(x.clone(), layers, rows, held)

    with pytest.raises(IndexError, match=f"cache of {blocks - 1} blocks"):
        compute([layer, plain], caches(kernels, blocks - 1, 2))
    with pytest.raises(ValueError, match="2 decoder layers have 1 caches"):
        compute([layer, plain], caches(kernels, blocks, 1))
    with pytest.raises(ValueError, match="of such forms"):
        compute([layer, plain], [*caches(kernels, blocks, 1), *caches(kernels, blocks + 1, 1)])
    with pytest.raises(ValueError, match="needs a bank"):
        compute([replace(layer, bank=None)], caches(kernels, blocks, 1))
    with pytest.raises(ValueError, match="needs an MLP"):
        compute([replace(plain, down=None)], caches(kernels, blocks, 1))
    with pytest.raises(ValueError, match=r"\(4, 96\) is needed"):
        kernels.decoder(x[:3].clone(), [plain], rows, caches(kernels, blocks, 1))
    assert layer.slot_of_E is not None
    nowhere = replace(layer, slot_of_E=torch.full_like(layer.slot_of_E, -1))
    with pytest.raises(KeyError, match="not in the bank"):
        compute([nowhere], caches(kernels, blocks, 1))
    assert torch.equal(kernels.decoder(x, [], rows, []), x)
