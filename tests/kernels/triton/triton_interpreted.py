"""The Triton kernels against the reference, in Triton's CPU interpreter or on a GPU.

Not collected by itself: test_triton.py runs it with TRITON_INTERPRET=1, `make test-gpu` on a GPU.
Tolerances: bfloat16 keeps 8 significant bits, so a rounded result may be off by 2^-8 of its size (sums are added in
different orders, then rounded), and products of rounded intermediates by a few times that. Float32 results
differ by summation order only.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, KERNELS, Paged, close, pairs_of, randn
from weight_cases import filled_banks, stored

from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight
from isotherm.kernels.ops import Router
from isotherm.kernels.reference import ReferenceKernels, candidates, gumbel_noise
from isotherm.kernels.triton.attention import KV_SPLIT
from isotherm.kernels.triton.backend import TritonKernels
from isotherm.kernels.triton.sample import gumbel as gumbel_of

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
SETTINGS = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


@pytest.fixture(params=[BF16, F32], ids=["bf16", "f32"])
def kernels(request: pytest.FixtureRequest) -> TritonKernels:
    return KERNELS[request.param]


def exact_linear(x: torch.Tensor, weights: list[StoredWeight], bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.float() @ torch.cat([w.dequantise(F32) for w in weights]).T
    return out if bias is None else out + bias


# --- the interpreter's corrections ----------------------------------------------------------------


@triton.jit
def cast_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(out.dtype.element_ty), mask=i < n)


def test_interpreted_casts_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875, 3.4e38, 1e-40, -2.0])
    for source, target in (
        (codes, F32),
        (codes, BF16),
        (torch.cat([special, randn(4000, seed=1)]), BF16),
        (randn(4000, seed=2, dtype=BF16), F32),
    ):
        out = torch.empty(len(source), dtype=target, device=DEVICE)
        cast_kernel[(1,)](source.to(DEVICE), out, len(source), 4096)
        assert torch.equal(out.cpu().nan_to_num(7.25), source.to(target).nan_to_num(7.25))


# --- against the reference ------------------------------------------------------------------------


@SETTINGS
@given(
    rows=st.sampled_from([0, 1, 2, 17, 33, 65, 130]),
    columns=st.sampled_from([1, 31, 64, 127, 128, 200, 384, 1100]),
    parts=st.lists(st.sampled_from([1, 7, 33, 100, 160]), min_size=1, max_size=3),
    kind=st.sampled_from(["bf16", "f16", "f32", "fp8"]),
    bias=st.booleans(),
    wide=st.booleans(),
)
def test_linear(
    kernels: TritonKernels, rows: int, columns: int, parts: list[int], kind: str, bias: bool, wide: bool
) -> None:
    weights = [stored(n, columns, kind, seed) for seed, n in enumerate(parts)]
    b = randn(sum(parts), seed=9) if bias else None
    x = randn(rows, columns, seed=10, dtype=kernels.dtype)
    packed = kernels.pack_linear(weights, b)
    assert (packed.out_features, packed.in_features) == (sum(parts), columns)
    out = kernels.linear(x, packed, F32 if wide else None)
    exact = kind in ("bf16", "fp8") or kernels.dtype == F32
    close(out, exact_linear(x, weights, b).to(out.dtype), (F32 if wide else kernels.dtype) if exact else BF16)


def test_fp8_decode_is_exact_for_every_code(kernels: TritonKernels) -> None:
    """Unit vectors pick single weights out, so each output is one decoded code times a power of two."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN would spread over its row
    packed = kernels.pack_linear([Fp8Weight(codes.view(FP8).repeat(40, 1), torch.tensor([[4.0, 0.25]]))])
    expected = codes.view(FP8).float() * torch.tensor([4.0] * 128 + [0.25] * 128)
    assert torch.equal(
        kernels.linear(torch.eye(256, dtype=kernels.dtype), packed, F32), expected[:, None].expand(256, 40)
    )
    assert packed.nbytes < 2 * 128 * 256


def test_mixed_parts_and_strided_sources(kernels: TritonKernels) -> None:
    plain, scaled = stored(40, 256, "bf16", 0), stored(33, 256, "fp8", 1)
    x = randn(3, 512, seed=2, dtype=kernels.dtype)[:, 128:384]  # rows lie apart
    close(
        kernels.linear(x, kernels.pack_linear([plain, scaled])),
        exact_linear(x, [plain, scaled]).to(kernels.dtype),
        BF16,
    )
    view = PlainWeight(randn(40, 300, seed=3, dtype=BF16)[:, 20:276])
    close(kernels.linear(x, kernels.pack_linear([view])), exact_linear(x, [view]).to(kernels.dtype), kernels.dtype)


@SETTINGS
@given(
    rows=st.sampled_from([0, 1, 20]),
    heads=st.integers(1, 3),
    n=st.sampled_from([16, 33, 128]),
    k=st.sampled_from([15, 64, 130]),
)
def test_head_linear(kernels: TritonKernels, rows: int, heads: int, n: int, k: int) -> None:
    weight = randn(heads, k, n, seed=1, dtype=kernels.dtype, scale=k**-0.5).transpose(1, 2)
    x = randn(rows, heads, k + 6, seed=2, dtype=kernels.dtype)[..., :k]
    expected = torch.einsum("thk,hnk->thn", x.float(), weight.float()).to(kernels.dtype)
    close(kernels.head_linear(x, kernels.pack_heads([PlainWeight(w) for w in weight])), expected, kernels.dtype)


@SETTINGS
@given(rows=st.sampled_from([0, 1, 40, 130]), hidden=st.sampled_from([33, 256]), inner=st.sampled_from([17, 96, 160]),
       kind=st.sampled_from(["bf16", "fp8"]))  # fmt: skip
def test_mlp(kernels: TritonKernels, rows: int, hidden: int, inner: int, kind: str) -> None:
    gate, up, down = stored(inner, hidden, kind, 0), stored(inner, hidden, kind, 2), stored(hidden, inner, kind, 4)
    x = randn(rows, hidden, seed=6, dtype=kernels.dtype)
    out, expected = (
        k.mlp(x, k.pack_linear([gate, up]), k.pack_linear([down])) for k in (kernels, ReferenceKernels(kernels.dtype))
    )
    close(out, expected, kernels.dtype, 6)


@SETTINGS
@given(
    data=st.data(),
    hidden=st.sampled_from([48, 128]),
    inner=st.sampled_from([32, 50]),
    kind=st.sampled_from(["bf16", "fp8"]),
)
def test_experts(kernels: TritonKernels, data: st.DataObject, hidden: int, inner: int, kind: str) -> None:
    """Experts with many rows, one and none, in any order of slots."""
    reference = ReferenceKernels(kernels.dtype)
    banks = filled_banks([kernels, reference], 6, hidden, inner, kind)
    rows = data.draw(st.sampled_from([1, 20, 70]))
    chosen = data.draw(st.permutations(range(5)))[: data.draw(st.integers(0, 5))]
    run = {e: sorted(data.draw(st.sets(st.integers(0, rows - 1), max_size=rows))) for e in chosen}
    pairs = pairs_of(run)
    x = randn(rows, hidden, seed=1, dtype=kernels.dtype)
    close(kernels.experts(x, banks[0], *pairs), reference.experts(x, banks[1], *pairs), kernels.dtype, 6)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_bank_memory_and_errors(kernels: TritonKernels, kind: str) -> None:
    (bank,) = filled_banks([kernels], 3, 256, 128, kind)
    full = bank.nbytes
    codes = 2 * 3 * 256 * 128 * (1 if kind == "fp8" else 2)
    assert codes <= full < 1.05 * codes
    x = randn(2, 256, seed=0, dtype=kernels.dtype)
    with pytest.raises(KeyError, match=r"\[2\]"):
        kernels.experts(x, bank, *pairs_of({0: [0], 2: [1]}))
    with pytest.raises(ValueError, match="slots take"):
        bank.load(0, *(stored(128, 128, "bf16", 0),) * 3)
    with pytest.raises(IndexError):
        bank.drop(3)
    bank.drop(1)
    assert bank.nbytes == full // 2
    with pytest.raises(KeyError):
        kernels.experts(x, bank, *pairs_of({1: [0]}))


def test_an_empty_slot_gives_nan_where_it_cannot_be_refused(
    kernels: TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bank,) = filled_banks([kernels], 3, 128, 64, "bf16")
    monkeypatch.setattr(bank, "empty", lambda slots: [])  # as on a GPU, where the host doesn't see the slots
    out = kernels.experts(randn(2, 128, seed=0, dtype=kernels.dtype), bank, *pairs_of({2: [0, 1], 0: [1]}))
    assert out[:2].isnan().all() and out[2].isfinite().all()


@SETTINGS
@given(rows=st.sampled_from([0, 1, 6]), width=st.sampled_from([8, 33, 512, 1536]))
def test_rms_norm(kernels: TritonKernels, rows: int, width: int) -> None:
    x, weight = (
        randn(rows, width + 5, seed=1, dtype=kernels.dtype)[:, :width],
        randn(width, seed=2, dtype=kernels.dtype),
    )
    close(
        kernels.rms_norm(x, weight, 1e-6), ReferenceKernels(kernels.dtype).rms_norm(x, weight, 1e-6), kernels.dtype, 1
    )
    residual = randn(rows, width, seed=3, dtype=kernels.dtype)
    total = (residual.float() + x.float()).to(kernels.dtype)
    fused = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(fused, kernels.rms_norm(total, weight, 1e-6))


@SETTINGS
@given(rows=st.sampled_from([0, 1, 9]), heads=st.sampled_from([1, 3, 40]), width=st.sampled_from([2, 6, 64]))
def test_rope_equals_the_reference(kernels: TritonKernels, rows: int, heads: int, width: int) -> None:
    x = randn(rows, heads, width + 10, seed=1, dtype=kernels.dtype)[..., 10:]
    angle = randn(rows, width // 2, seed=2, scale=5.0)
    assert torch.equal(
        kernels.rope(x, angle.cos(), angle.sin()), ReferenceKernels(kernels.dtype).rope(x, angle.cos(), angle.sin())
    )


@SETTINGS
@given(
    rows=st.sampled_from([0, 1, 5, 40]),
    hidden=st.sampled_from([32, 100, 600]),
    shape=st.sampled_from([(8, 1, 1, 2), (64, 8, 4, 8), (6, 3, 1, 2), (4, 4, 2, 2), (256, 8, 4, 8), (12, 3, 2, 5)]),
    normalise=st.booleans(),
)
def test_route(
    kernels: TritonKernels, rows: int, hidden: int, shape: tuple[int, int, int, int], normalise: bool
) -> None:
    experts, groups, kept, k = shape
    router = Router(
        randn(experts, hidden, seed=1, scale=hidden**-0.5),
        randn(experts, seed=2, scale=0.1),
        groups,
        kept,
        k,
        normalise,
        2.5,
    )
    x = randn(rows, hidden, seed=3, dtype=kernels.dtype)
    ids, weights = kernels.route(x, router)
    expected_ids, expected_weights = ReferenceKernels(kernels.dtype).route(x, router)
    assert torch.equal(ids, expected_ids)  # these seeds have no two scores within float32 rounding of each other
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


def test_route_ties_go_to_the_lower_id(kernels: TritonKernels) -> None:
    router = Router(torch.zeros(16, 32), torch.zeros(16), 4, 2, 3, True, 1.0)
    ids, weights = kernels.route(randn(2, 32, seed=0, dtype=kernels.dtype), router)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
    # Scores in eighths: sums of two are exact, and ties are everywhere.
    gate = torch.zeros(32, 32)
    bias = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(1)) / 8
    tied = Router(gate, bias, 8, 3, 7, True, 1.0)
    x = randn(4, 32, seed=1, dtype=kernels.dtype)
    assert torch.equal(kernels.route(x, tied)[0], ReferenceKernels(kernels.dtype).route(x, tied)[0])


@SETTINGS
@given(rows=st.sampled_from([0, 1, 5, 30]), width=st.sampled_from([7, 64, 1500]), k=st.integers(1, 8))
def test_combine_equals_the_reference(kernels: TritonKernels, rows: int, width: int, k: int) -> None:
    y = randn(rows * k + 1, width, seed=1, dtype=kernels.dtype)
    index = torch.randperm(rows * k, generator=torch.Generator().manual_seed(2)).reshape(rows, k)
    weights = randn(rows, k, seed=3)
    assert torch.equal(kernels.combine(y, index, weights), ReferenceKernels(kernels.dtype).combine(y, index, weights))


@pytest.mark.parametrize("latent, rotary", [(32, 16), (40, 6), (3, 30)])
def test_write_cache_equals_the_reference(kernels: TritonKernels, latent: int, rotary: int) -> None:
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:11]
    entry = randn(11, latent + rotary, seed=2, dtype=kernels.dtype)
    ours, theirs = (torch.zeros(10, 6, latent + rotary, dtype=kernels.dtype) for _ in range(2))
    for k, cache in ((kernels, ours), (ReferenceKernels(kernels.dtype), theirs)):
        k.write_cache(entry[:, :latent], entry[:, latent:], cache, slots)
        k.write_cache(entry[:0, :latent], entry[:0, latent:], cache, slots[:0])
    assert torch.equal(ours, theirs)


@SETTINGS
@given(
    lengths=st.lists(
        st.sampled_from([1, 2, 33, 200, KV_SPLIT, KV_SPLIT + 1, 2 * KV_SPLIT + 60]), min_size=1, max_size=3
    ),
    block_size=st.sampled_from([1, 16, 48, 64, 128]),
    shape=st.sampled_from([(1, 32, 16), (3, 40, 6), (70, 64, 32), (2, 33, 2)]),
    data=st.data(),
)
def test_mla_decode(
    kernels: TritonKernels, lengths: list[int], block_size: int, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    heads, latent, rotary = shape
    paged = Paged(kernels, lengths, block_size, latent, rotary)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    seen = [data.draw(st.integers(max(1, lengths[s] - 3), lengths[s])) for s in rows]
    q = randn(len(rows), heads, latent + rotary, seed=5, dtype=kernels.dtype)
    arguments = (
        paged.cache,
        paged.tables,
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(seen, dtype=torch.int32),
        (latent + rotary) ** -0.5,
    )
    expected = ReferenceKernels(kernels.dtype).mla_decode(q[..., :latent], q[..., latent:], *arguments)
    close(kernels.mla_decode(q[..., :latent], q[..., latent:], *arguments), expected, kernels.dtype)


@SETTINGS
@given(
    start=st.sampled_from([0, 1, 63, 260]),
    rows=st.sampled_from([0, 1, 7, 65, 130]),
    block_size=st.sampled_from([4, 48]),
    shape=st.sampled_from([(1, 32, 16, 16, 16), (3, 40, 6, 10, 22), (2, 64, 32, 64, 32), (2, 33, 2, 17, 30)]),
    kind=st.sampled_from(["bf16", "fp8"]),
)
def test_mla_prefill(
    kernels: TritonKernels, start: int, rows: int, block_size: int, shape: tuple[int, int, int, int, int], kind: str
) -> None:
    heads, latent, rotary, nope, value = shape
    reference = ReferenceKernels(kernels.dtype)
    paged = Paged(kernels, [max(start + rows, 1)], block_size, latent, rotary)
    kv_b = stored(heads * (nope + value), latent, kind, 3)
    q = randn(rows, heads, nope + rotary, seed=4, dtype=kernels.dtype)
    out, expected = (
        k.mla_prefill(q, paged.cache, paged.tables[0], start, k.pack_linear([kv_b]), value, 0.2)
        for k in (kernels, reference)
    )
    close(out, expected, kernels.dtype, 3)


# --- sampling -------------------------------------------------------------------------------------


@triton.jit
def hash_kernel(seed, index, ids, out, BLOCK: tl.constexpr):
    from_sample = gumbel_of(tl.load(seed), tl.load(index), tl.load(ids + tl.arange(0, BLOCK)))
    tl.store(out + tl.arange(0, BLOCK), from_sample)


def test_noise_is_the_references() -> None:
    ids = torch.cat([torch.arange(1000), torch.tensor([129_279, 2**31, 2**40] * 8)])
    for seed, index in ((0, 0), (-1, 5), (2**62, 10**6), (-(2**63), 1), (12345, 2**40)):
        out = torch.empty(1024, dtype=torch.float64, device=DEVICE)
        numbers = (t.to(DEVICE) for t in (torch.tensor([seed]), torch.tensor([index]), ids))
        hash_kernel[(1,)](*numbers, out, 1024)
        np.testing.assert_allclose(out.cpu().numpy(), gumbel_noise(seed, index, ids).numpy(), rtol=1e-14, atol=0)


@SETTINGS
@given(
    vocab=st.sampled_from([1, 2, 63, 1000, 5001]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 30_000]),
    masked=st.booleans(),
)
def test_sample_equals_the_reference(
    vocab: int, spread: float, temperature: float, top_p: float, top_k: int, masked: bool
) -> None:
    rows = 6
    logits = (randn(rows, vocab, seed=vocab) * spread).to(BF16).float()  # rounded, so that equal logits occur
    if masked and vocab > 2:
        logits[:, ::2] = -torch.inf
    seeds = torch.tensor([0, -1, 2**62, 12345, -(2**63), 7])
    parameters = (torch.full((rows,), temperature, dtype=torch.float64),
                  torch.full((rows,), top_p, dtype=torch.float64), torch.full((rows,), top_k), seeds,
                  torch.arange(rows) * 1_000_003)  # fmt: skip
    chosen = KERNELS[F32].sample(logits, *parameters)
    expected = ReferenceKernels(F32).sample(logits, *parameters)
    for t in (chosen != expected).nonzero().flatten().tolist():
        # Softmax sums in another order may move the edge of top-p by one token when p lies on it to the last bits.
        _, kept = candidates(logits[t] / temperature, top_p, top_k)
        sorted_logits = (logits[t] / temperature).sort(descending=True).values[: top_k or None].double().softmax(-1)
        assert top_p < 1 and (sorted_logits.cumsum(-1)[len(kept) - 2 : len(kept)] - top_p).abs().min() < 1e-9, (
            t,
            chosen[t],
            expected[t],
        )
