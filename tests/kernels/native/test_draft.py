"""All guesses of a step in one native call: those that come of the operations one by one, and the same cache; and what
is refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_cases import LATENT, ROTARY, WIDTH, attention_weights, native, runnable
from torch import Tensor
from weight_cases import BF16, F32, filled_banks, randn, stored

from isotherm.actors.attention.mtp_drafter import MtpDrafter
from isotherm.actors.models.decoder import Layer, Mlp
from isotherm.actors.models.mtp import MtpLayer
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.kernels.cache_rows import new_layer_cache
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import DraftLayer, DraftStream, Kernels, Router

EXPERTS, INNER, VOCABULARY, POSITIONS, BLOCK, BLOCKS = 8, 64, 80, 96, 4, 64
CONFIG = SchedulerConfig(BLOCK, BLOCKS, 128, 8, POSITIONS)
CPU = torch.device("cpu")


class Here:
    """Experts that are all in one bank."""

    finding_fault, patience, waited_seconds = False, 0.0, 0.0

    def __init__(self, kernels: Kernels, kind: str):
        self.kernels = kernels
        (self.bank,) = filled_banks([kernels], EXPERTS + 1, WIDTH, INNER, kind)
        self.slots = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4], dtype=torch.int32)

    def begin_step(self) -> None: ...
    def end_step(self) -> None: ...
    def abandon(self) -> None: ...

    def bank_of(self, _layer: int) -> Any:
        return self.bank, self.slots

    def moe(self, _layer: int, x_TD: Tensor, router: Router, gate_up: Any, down: Any, residual_TD: Tensor) -> Tensor:
        return self.kernels.moe(x_TD, router, self.bank, self.slots, gate_up, down, residual_TD)


@pytest.fixture(scope="module", params=[(isa, dtype) for isa in runnable() for dtype in (BF16, F32)], ids=str)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    isa, dtype = request.param
    return native(dtype, 2, isa)


def layer_of(kernels: NativeKernels, kind: str, form: str, fp8: bool = False) -> MtpLayer:
    """`form`: dense, experts alone, or with a shared one."""
    router = Router(randn(EXPERTS, WIDTH, seed=1, scale=0.1), randn(EXPERTS, seed=2, scale=0.1), 4, 2, 3, True, 2.5)
    inner = 96 if form == "dense" else INNER
    mlp = Mlp(
        kernels.pack_linear([stored(inner, WIDTH, kind, i) for i in (3, 4)]),
        kernels.pack_linear([stored(WIDTH, inner, kind, 5)]),
    )
    norms = {
        name: randn(WIDTH, seed=30 + i, dtype=kernels.dtype)
        for i, name in enumerate(("main_norm", "enorm", "hnorm", "norm"))
    }
    return MtpLayer(
        kernels=kernels, number=0, eps=1e-5, embedding=randn(VOCABULARY, WIDTH, seed=6, dtype=kernels.dtype),
        eh_proj=kernels.pack_linear([stored(WIDTH, 2 * WIDTH, kind, 7)]),
        layer=Layer(
            attention_weights(kernels, kind, 40 if form == "dense" else None, form == "dense"),
            None if form == "alone" else mlp, None if form == "dense" else router,
        ),
        head=kernels.pack_linear([stored(VOCABULARY, WIDTH, kind, 8)]), fp8_cache=fp8,
        cos=randn(POSITIONS, ROTARY // 2, seed=9), sin=randn(POSITIONS, ROTARY // 2, seed=10), **norms,
    )  # fmt: skip


class Streams:
    """Streams of one drafter, whose main model's output is noise."""

    def __init__(self, drafter: MtpDrafter, dtype: torch.dtype, temperatures: tuple[float, ...]):
        self.drafter, self.dtype = drafter, dtype
        self.sequences = []
        blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).split(12)
        for i, temperature in enumerate(temperatures):
            params = SamplingParams(40, temperature, 0.9, 20 * (i % 2), seed=i)
            request = GenerationRequest(f"{i}", (1,) * (9 + i), params)
            self.sequences.append(ScheduledSequence(request, i, [], running=True, blocks=blocks[i].tolist()))

    def step(self, counts: list[int], form: Form, seed: int, wanted: list[int]) -> list[list[int]]:
        """So many tokens of each are computed; then guesses for each."""
        chunks = []
        for sequence, count in zip(self.sequences, counts, strict=True):
            begin, sequence.computed = sequence.computed, sequence.computed + count
            new = torch.randint(VOCABULARY, (count + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
            sequence.tokens[begin:] = new
            chunks.append(Chunk(sequence, begin, count, form, sample=True))
        self.drafter.computed(chunks, randn(sum(counts), WIDTH, seed=seed, dtype=self.dtype))
        return self.drafter.draft(list(zip(self.sequences, wanted, strict=True)))


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("form", ["dense", "alone", "shared"])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain-cache", "fp8-cache"])
@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.8, 1.3)])
def test_guesses_in_one_call_are_those_of_the_operations(
    kernels: NativeKernels, kind: str, form: str, fp8: bool, temperatures: tuple[float, ...]
) -> None:
    """After prompts, in prefill form and in decode form in one pass, after tokens that came with drafts, and after
    steps without any; for one stream and for several, greedy and sampled, with as many guesses as each wants."""
    experts, layer = Here(kernels, kind), layer_of(kernels, kind, form, fp8)
    together, apart = MtpDrafter(layer, experts, CONFIG), MtpDrafter(layer, experts, CONFIG)
    assert together._whole is not None
    apart._whole = None
    n, seen = len(temperatures), set()
    both = [Streams(drafter, kernels.dtype, temperatures) for drafter in (together, apart)]
    for seed, (counts, form_of, wanted) in enumerate((
        ([9, 3, 10], Form.PREFILL, [4, 1, 2]), ([1, 2, 3], Form.DECODE, [3, 4, 1]), ([2, 9, 1], Form.DECODE, [1, 2, 4]),
    )):  # fmt: skip
        one, other = (streams.step(counts[:n], form_of, seed, wanted[:n]) for streams in both)
        assert one == other and list(map(len, one)) == wanted[:n]
        assert torch.equal(together._cache, apart._cache) and together.passes == apart.passes
        seen.update(token for tokens in one for token in tokens)
    assert len(seen) > 3


def test_a_run_that_begins_late_looks_at_its_own_blocks(kernels: NativeKernels) -> None:
    experts, layer = Here(kernels, "bf16"), layer_of(kernels, "bf16", "shared")
    drafters = [MtpDrafter(layer, experts, replace(CONFIG, max_batch_tokens=8)) for _ in range(2)]
    drafters[1]._whole = None
    one, other = (Streams(drafter, kernels.dtype, (0.0,)).step([30], Form.PREFILL, 3, [4]) for drafter in drafters)
    assert one == other
    assert torch.equal(drafters[0]._cache, drafters[1]._cache)
    assert int((drafters[0]._cache != 0).any(-1).sum()) == 6 + 3  # from a block among the last eight positions on


def stream(rows: int = 2, **changed: Any) -> DraftStream:
    hidden = [(randn(4, WIDTH, seed=7, dtype=F32), 1, rows)]
    return DraftStream([3, 1], 0, 4, [5] * rows, False, hidden, 2, 0.0, 1.0, 0, 0, 0)._replace(**changed)


def test_what_does_not_fit_is_refused() -> None:
    kernels = native(F32)
    layer = layer_of(kernels, "bf16", "alone").whole(Here(kernels, "bf16"))
    assert layer is not None
    cache = new_layer_cache(8, BLOCK, LATENT, ROTARY, F32, CPU, False)

    def draft(*streams: DraftStream, of: DraftLayer = layer) -> list[list[int]]:
        return kernels.draft(of, cache, streams)

    assert list(map(len, draft(stream(), stream(blocks=[4, 5])))) == [2, 2]
    refused = [
        {"blocks": [3, 8]}, {"blocks": [3, -1]}, {"blocks": [3]}, {"skipped": 1, "start": 3}, {"start": -1},
        {"start": 6, "guesses": 2}, {"tokens": [5, VOCABULARY]}, {"tokens": [5, -1]}, {"tokens": [5]}, {"guesses": 0},
    ]  # fmt: skip
    for changed in refused:
        with pytest.raises(IndexError, match="draft: tokens or positions are out of range"):
            draft(stream(), stream(**changed))
    with pytest.raises(IndexError, match="out of range"):
        draft(stream(expanded=True), stream(blocks=[4, 5]))
    with pytest.raises(IndexError, match="out of range"):
        draft(stream(), of=replace(layer, cos=layer.cos[:6], sin=layer.sin[:6]))
    with pytest.raises(ValueError, match="draft has rows 3 … 4 of 4"):
        draft(stream(hidden=[(randn(4, WIDTH, seed=7), 3, 2)]))
    for rows in (randn(4, WIDTH, seed=7, dtype=BF16), randn(4, WIDTH + 1, seed=7), randn(WIDTH, 4, seed=7).T):
        with pytest.raises(ValueError, match=r"contiguous torch.float32 \(T, 96\) is needed"):
            draft(stream(hidden=[(rows, 1, 2)]))
    with pytest.raises(ValueError, match=r"enorm is \(95,\), not \(96,\); head is"):
        draft(stream(), of=replace(layer, enorm=layer.enorm[1:], head=layer.eh_proj))
    slots = layer.layer.slot_of_E
    assert slots is not None
    nowhere = replace(layer, layer=replace(layer.layer, slot_of_E=torch.full_like(slots, -1)))
    with pytest.raises(KeyError, match="not in the bank"):
        draft(stream(), of=nowhere)


def test_kernels_keep_no_layer_and_no_cache_alive(kernels: NativeKernels) -> None:
    drafter = MtpDrafter(layer_of(kernels, "bf16", "shared"), Here(kernels, "bf16"), CONFIG)
    Streams(drafter, kernels.dtype, (0.0,)).step([9], Form.PREFILL, 3, [2])
    assert drafter._whole is not None
    seen = [weakref.ref(one) for one in (drafter._whole, drafter._cache)]
    del drafter
    gc.collect()
    assert [ref() for ref in seen] == [None] * 2
