"""The reference kernels against the formulas' plainest writing. Shape suffixes as in kernels/ops.py."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.ops import Router
from isotherm.kernels.reference import ReferenceKernels, candidates, gumbel_noise

KERNELS = ReferenceKernels(torch.float32)
BF16 = ReferenceKernels(torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_packed_weights_are_copies(heads: int):
    """What is packed may be a view of a mapped file that is closed, replaced or cut afterwards."""
    weight, bank = normal(4, 4), KERNELS.expert_bank(1, 4, 4)
    head_weight = normal(heads, 5, 4, seed=1).transpose(1, 2)  # so that one head's packed form has the same layout
    linear, packed = (
        KERNELS.pack_linear([PlainWeight(weight)]),
        KERNELS.pack_heads([PlainWeight(w) for w in head_weight]),
    )
    bank.load(0, PlainWeight(weight), PlainWeight(weight), PlainWeight(weight))
    before = [
        linear.data.clone(),
        packed.clone(),
        bank.gate_up[0].clone(),  # type: ignore[union-attr]
        bank.down[0].clone(),  # type: ignore[union-attr]
    ]
    weight.fill_(7)
    head_weight.fill_(7)
    for now, then in zip([linear.data, packed, bank.gate_up[0], bank.down[0]], before, strict=True):
        assert torch.equal(now, then)  # type: ignore[arg-type]


# --- dense operations -----------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(eps: float):
    x, weight = normal(5, 24), 1 + normal(24, seed=1)
    out = KERNELS.rms_norm(x, weight, eps)
    for t in range(5):
        root = math.sqrt(sum(float(v) ** 2 for v in x[t]) / 24 + eps)
        torch.testing.assert_close(out[t], x[t] / root * weight, rtol=1e-6, atol=1e-6)


def test_rms_norm_rounds_before_the_weight_as_transformers_does():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    norm = DeepseekV3RMSNorm(64, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = (1 + normal(64)).to(torch.bfloat16)
    x = (30 * normal(50, 64, seed=1)).to(torch.bfloat16)
    out = BF16.rms_norm(x, norm.weight.data, 1e-5)
    assert out.dtype == torch.bfloat16 and torch.equal(out, norm(x))


def test_packed_projections_stand_side_by_side_with_their_bias():
    x, a, b, bias = normal(3, 8), normal(5, 8, seed=1), normal(2, 8, seed=2), normal(7, seed=3)
    packed = KERNELS.pack_linear([PlainWeight(a), PlainWeight(b)], bias)
    assert (packed.out_features, packed.in_features, packed.nbytes) == (7, 8, 7 * 8 * 4)
    torch.testing.assert_close(KERNELS.linear(x, packed), torch.cat([x @ a.T, x @ b.T], -1) + bias)


def test_linear_output_dtype():
    x = normal(3, 8).to(torch.bfloat16)
    packed = BF16.pack_linear([PlainWeight(normal(5, 8, seed=1))])
    assert packed.data.dtype == BF16.linear(x, packed).dtype == torch.bfloat16
    assert BF16.linear(x, packed, torch.float32).dtype == torch.float32


def test_a_bias_is_added_in_float32():
    x, weight, bias = torch.full((1, 1), 256.0), torch.ones(1, 1), torch.tensor([-255.5])
    packed = BF16.pack_linear([PlainWeight(weight)], bias)
    assert float(BF16.linear(x.to(torch.bfloat16), packed)) == 0.5  # -255.5 is no bf16


def test_head_linear():
    x, weight = normal(4, 3, 6), normal(3, 5, 6, seed=1)
    out = KERNELS.head_linear(x, KERNELS.pack_heads([PlainWeight(w) for w in weight]))
    torch.testing.assert_close(out, torch.einsum("thk,hnk->thn", x, weight))


def test_mlp():
    x, gate, up, down = normal(4, 6), normal(9, 6, seed=1), normal(9, 6, seed=2), normal(6, 9, seed=3)
    out = KERNELS.mlp(
        x, KERNELS.pack_linear([PlainWeight(gate), PlainWeight(up)]), KERNELS.pack_linear([PlainWeight(down)])
    )
    g = x @ gate.T
    torch.testing.assert_close(out, (g / (1 + torch.exp(-g)) * (x @ up.T)) @ down.T, rtol=1e-5, atol=1e-5)


def test_rope_is_complex_multiplication():
    """As in DeepSeek's inference/model.py: pairs as complex numbers, times e^{i·angle}."""
    x, angles = normal(7, 3, 8), 10 * normal(7, 4, seed=1)
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    torch.testing.assert_close(KERNELS.rope(x, angles.cos(), angles.sin()), torch.view_as_real(turned).flatten(-2))


def test_rope_scales_with_its_tables_and_keeps_the_dtype():
    x, angles = normal(2, 1, 4), normal(2, 2, seed=1)
    once, twice = (KERNELS.rope(x, f * angles.cos(), f * angles.sin()) for f in (1, 2))
    torch.testing.assert_close(2 * once, twice)
    assert KERNELS.rope(x.to(torch.bfloat16), angles.cos(), angles.sin()).dtype == torch.bfloat16


# --- routing --------------------------------------------------------------------------------------


def brute_force_route(scores: list[float], bias: list[float], router: Router) -> tuple[list[int], list[float]]:
    """arXiv:2412.19437, §2.1.2, for one token, by sorting in Python; equal values go to the lower index."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // router.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(router.n_group)]
    group_scores = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(router.n_group), key=lambda g: (-group_scores[g], g))[: router.topk_group]
    allowed = [e for g in kept for e in groups[g]]
    chosen = sorted(sorted(allowed, key=lambda e: (-biased[e], e))[: router.top_k])
    weights = [scores[e] for e in chosen]
    if router.normalise:
        weights = [w / (sum(weights) + 1e-20) for w in weights]
    return chosen, [w * router.scaling for w in weights]


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Router]:
    """Rows of logits and a router that passes them through. Values come from short lists, so that ties are common, and
    sums of two are exact."""
    n_group = draw(st.integers(1, 4))
    experts = n_group * draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, experts // n_group * topk_group))
    rows = draw(
        st.lists(
            st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0]), min_size=experts, max_size=experts), min_size=1, max_size=5
        )
    )
    bias = draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25]), min_size=experts, max_size=experts))
    router = Router(
        torch.eye(experts),
        torch.tensor(bias),
        n_group,
        topk_group,
        top_k,
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 2.5])),
    )
    return torch.tensor(rows), router


@given(routings())
def test_route_agrees_with_brute_force_also_where_scores_are_equal(routing: tuple[Tensor, Router]):
    x, router = routing
    ids, weights = KERNELS.route(x, router)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    scores = x.sigmoid()
    for t in range(len(x)):
        # In float32, as the bias is added in it: rounding may make scores equal.
        biased = (scores[t] + router.bias).tolist()
        exact = [b - s for b, s in zip(biased, scores[t].tolist(), strict=True)]
        expected_ids, expected = brute_force_route(scores[t].tolist(), exact, router)
        assert ids[t].tolist() == expected_ids
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_correction_bias_chooses_and_does_not_weigh():
    router = Router(torch.eye(4), torch.tensor([0.0, 0.0, 0.0, 9.0]), 1, 1, 1, False, 1.0)
    ids, weights = KERNELS.route(torch.tensor([[5.0, 0.0, 0.0, -1.0]]), router)
    assert ids.tolist() == [[3]] and float(weights) == pytest.approx(1 / (1 + math.e))


def test_an_expert_of_a_rejected_group_is_never_chosen():
    """Not even where every allowed one scores below zero (a mask of 0 instead of -inf would let it in)."""
    router = Router(torch.eye(4), torch.tensor([-3.0, -3.0, -2.0, -2.0]), 2, 1, 2, True, 1.0)
    assert KERNELS.route(torch.zeros(1, 4), router)[0].tolist() == [[2, 3]]


def test_the_router_works_in_float32():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    router = Router(torch.tensor([[1.0, 0.001], [1.0, 0.002]]), torch.zeros(2), 1, 1, 1, False, 1.0)
    ids, weights = BF16.route(x, router)
    assert ids.tolist() == [[1]] and float(weights) == pytest.approx(1 / (1 + math.exp(-1.002)), rel=1e-6)


# --- experts --------------------------------------------------------------------------------------


def test_experts_agree_with_a_plain_loop():
    hidden, inner, slots = 6, 5, 5
    bank = KERNELS.expert_bank(slots, hidden, inner)
    weights = {
        s: [normal(inner, hidden, seed=s), normal(inner, hidden, seed=10 + s), normal(hidden, inner, seed=20 + s)]
        for s in (0, 2, 3, 4)
    }
    for slot, (gate, up, down) in weights.items():
        bank.load(slot, PlainWeight(gate), PlainWeight(up), PlainWeight(down))
    x = normal(4, hidden, seed=99)
    rows, active, offsets = [3, 0, 1, 1, 2, 3], [4, 0, 2], [0, 1, 5, 6]
    out = KERNELS.experts(x, bank, *(torch.tensor(v, dtype=torch.int32) for v in (rows, active, offsets)))
    for a, slot in enumerate(active):
        gate, up, down = weights[slot]
        for p in range(offsets[a], offsets[a + 1]):
            row = x[rows[p]]
            torch.testing.assert_close(
                out[p], down @ (torch.nn.functional.silu(gate @ row) * (up @ row)), rtol=1e-5, atol=1e-5
            )


def test_experts_of_no_pairs():
    bank = KERNELS.expert_bank(1, 6, 5)
    none = torch.zeros(0, dtype=torch.int32)
    assert KERNELS.experts(torch.zeros(0, 6), bank, none, none, torch.zeros(1, dtype=torch.int32)).shape == (0, 6)


@pytest.mark.parametrize(("loaded", "empty"), [([0], [1]), ([], [0, 1])])
def test_an_empty_slot_is_an_error_that_names_it(loaded: list[int], empty: list[int]):
    bank = KERNELS.expert_bank(2, 6, 5)
    for slot in (0, 1):
        bank.load(slot, PlainWeight(torch.ones(5, 6)), PlainWeight(torch.ones(5, 6)), PlainWeight(torch.ones(6, 5)))
    for slot in empty:
        bank.drop(slot)
    assert bank.nbytes == len(loaded) * 3 * 30 * 4
    pairs = torch.tensor([0, 0], dtype=torch.int32)
    with pytest.raises(KeyError, match=rf"expert slots \[{', '.join(map(str, empty))}\] are empty"):
        KERNELS.experts(
            torch.ones(1, 6),
            bank,
            pairs,
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([0, 1, 2], dtype=torch.int32),
        )


def test_combine_weighs_and_gathers():
    y, index, weights = normal(6, 4), torch.tensor([[5, 0, 3], [1, 2, 4]], dtype=torch.int32), torch.rand(2, 3)
    expected = torch.stack(
        [sum(weights[t, j] * y[index[t, j]] for j in range(3)) for t in range(2)]  # type: ignore[misc]
    )
    torch.testing.assert_close(KERNELS.combine(y, index, weights), expected)


def test_combine_adds_from_left_to_right_in_float32():
    """(1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1: the order shows."""
    y = torch.tensor([[1e8], [1.0], [-1e8]])
    index = torch.tensor([[0, 1, 2], [0, 2, 1], [2, 1, 0]], dtype=torch.int32)
    assert KERNELS.combine(y, index, torch.ones(2 + 1, 3)).flatten().tolist() == [0.0, 1.0, 0.0]
    # bf16 outputs: 256 + 1 + 1 is 256 if it is rounded on the way.
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    out = BF16.combine(y, torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.ones(1, 3))
    assert out.dtype == torch.bfloat16 and float(out) == 258.0


# --- attention ------------------------------------------------------------------------------------

HEADS, NOPE, ROPE, VALUE, LATENT, SIZE = 3, 6, 4, 5, 8, 4  # all different; SIZE: tokens per block


class Mla:
    """One layer's queries and cache for a sequence of 11 tokens in scattered blocks; everything else in the cache is
    NaN."""

    def __init__(self, kernels: ReferenceKernels = KERNELS, length: int = 11):
        self.kernels, self.length = kernels, length
        self.latents, self.keys = (
            normal(length, LATENT).to(kernels.dtype),
            normal(length, ROPE, seed=1).to(kernels.dtype),
        )
        self.kv_b = normal(HEADS * (NOPE + VALUE), LATENT, seed=2)
        self.q = normal(length, HEADS, NOPE + ROPE, seed=3).to(kernels.dtype)
        self.table = torch.tensor([6, 2, 9], dtype=torch.int32)
        self.cache = torch.full((12, SIZE, LATENT + ROPE), torch.nan, dtype=kernels.dtype)
        self.scale = 0.37
        positions = torch.arange(length)
        kernels.write_cache(
            self.latents, self.keys, self.cache, self.table.long()[positions // SIZE] * SIZE + positions % SIZE
        )

    def expected(self) -> Tensor:
        """Causal attention over the whole sequence in float64, as in DeepSeek-V3's modeling_deepseek.py → [T,
        H × v]."""
        kv = (self.latents.double() @ self.kv_b.double().T).unflatten(-1, (HEADS, -1))
        out = torch.zeros(self.length, HEADS, VALUE, dtype=torch.float64)
        for t in range(self.length):
            for h in range(HEADS):
                keys = torch.cat([kv[: t + 1, h, :NOPE], self.keys[: t + 1].double()], -1)
                weights = (keys @ self.q[t, h].double() * self.scale).softmax(-1)
                out[t, h] = weights @ kv[: t + 1, h, NOPE:]
        return out.flatten(1).float()

    def prefill(self, start: int, count: int) -> Tensor:
        packed = self.kernels.pack_linear([PlainWeight(self.kv_b)])
        return self.kernels.mla_prefill(
            self.q[start : start + count], self.cache, self.table, start, packed, VALUE, self.scale
        )

    def decode(self, rows: list[int], tables: Tensor | None = None, sequence: list[int] | None = None) -> Tensor:
        kernels, kv_b = self.kernels, self.kv_b.unflatten(0, (HEADS, -1))
        q_latent = kernels.head_linear(
            self.q[rows][..., :NOPE], kernels.pack_heads([PlainWeight(w.T) for w in kv_b[:, :NOPE]])
        )
        out = kernels.mla_decode(
            q_latent,
            self.q[rows][..., NOPE:],
            self.cache,
            self.table[None] if tables is None else tables,
            torch.tensor(sequence or [0] * len(rows), dtype=torch.int32),
            torch.tensor([r + 1 for r in rows], dtype=torch.int32),
            self.scale,
        )
        assert out.shape == (len(rows), HEADS, LATENT)
        return kernels.head_linear(out, kernels.pack_heads([PlainWeight(w) for w in kv_b[:, NOPE:]])).flatten(1)


def test_write_cache_puts_latents_before_keys_at_their_slots():
    mla = Mla()
    assert torch.equal(mla.cache[6, 1], torch.cat([mla.latents[1], mla.keys[1]]))
    assert torch.equal(mla.cache[2, 3], torch.cat([mla.latents[7], mla.keys[7]]))
    assert torch.equal(mla.cache[9, 2], torch.cat([mla.latents[10], mla.keys[10]]))
    assert int(mla.cache.isnan().any(-1).sum()) == 12 * SIZE - 11, "nothing else is written"


@pytest.mark.parametrize(("start", "count"), [(0, 11), (0, 1), (3, 4), (4, 7), (10, 1)])
def test_prefill_in_expanded_form(start: int, count: int):
    mla = Mla()
    torch.testing.assert_close(mla.prefill(start, count), mla.expected()[start : start + count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[10], [0], [3], [4], list(range(11)), [7, 2, 9]])
def test_decode_in_absorbed_form_is_prefill_in_expanded_form(rows: list[int]):
    mla = Mla()
    torch.testing.assert_close(mla.decode(rows), mla.expected()[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mla.decode(rows), mla.prefill(0, 11)[rows], rtol=1e-5, atol=1e-5)


def test_decode_rows_of_several_sequences_read_their_own_blocks_only():
    """Sequence 1 has six tokens in other blocks; the padding of its table names block 6, which is sequence 0's."""
    mla, other = Mla(), Mla(length=6)
    mla.cache[11], mla.cache[1] = other.cache[6], other.cache[2]
    mixed = torch.stack([mla.q[10], other.q[5], mla.q[2], other.q[4]])
    mla.q[[10, 5, 2, 4]] = mixed
    out = mla.decode([10, 5, 2, 4], torch.tensor([[6, 2, 9], [11, 1, 6]], dtype=torch.int32), [0, 1, 0, 1])
    torch.testing.assert_close(out[[0, 2]], mla.expected()[[10, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[[1, 3]], other.expected()[[5, 4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_lies_beyond_a_rows_end_does_not_leak(poison: float):
    mla = Mla()
    clean = mla.decode([2, 5]), mla.prefill(0, 6)
    mla.cache[9] = poison
    mla.cache[2, 2:] = poison
    assert torch.equal(mla.decode([2, 5]), clean[0]) and torch.equal(mla.prefill(0, 6), clean[1])
    assert not clean[0].isnan().any() and not clean[1].isnan().any()


def test_attention_in_bf16_sums_in_float32():
    mla = Mla(BF16)
    for out in (mla.prefill(0, 11), mla.decode(list(range(11)))):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), mla.expected(), rtol=0.03, atol=0.03)


# --- sampling -------------------------------------------------------------------------------------


def sample(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, index: int = 0
) -> int:
    """One row."""
    return sample_rows(logits[None], [(temperature, top_p, top_k, seed, index)])[0]


def sample_rows(logits: Tensor, rows: list[tuple[float, float, int, int, int]]) -> list[int]:
    temperature, top_p, top_k, seed, index = zip(*rows, strict=True)
    out = KERNELS.sample(
        logits,
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(top_k),
        torch.tensor(seed),
        torch.tensor(index),
    )
    assert out.dtype == torch.int64 and out.shape == (len(rows),)
    return out.tolist()


def test_greedy_takes_the_lowest_id_of_equal_ones():
    logits = torch.full((300,), -1.0)
    logits[[7, 120, 299]] = 3.0
    assert sample(logits, temperature=0.0) == 7
    assert sample(torch.zeros(300), temperature=0.0) == 0


def test_greedy_ignores_every_other_parameter():
    logits = normal(50)
    assert {sample(logits, 0.0, p, k, s, i) for p in (0.1, 1.0) for k in (0, 3) for s in (0, 9) for i in (0, 5)} == {
        int(logits.argmax())
    }


def brute_force_candidates(logits: list[float], top_p: float, top_k: int) -> list[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        largest = logits[order[0]]
        weights = [math.exp(logits[i] - largest) for i in order]
        kept, reached, total = [], 0.0, math.fsum(weights)
        for i, w in zip(order, weights, strict=True):
            kept.append(i)
            reached += w / total
            if reached >= top_p:
                break
        order = kept
    return sorted(order)


@given(
    logits=st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=12),
    top_p=st.sampled_from([0.0, 0.05, 0.31, 0.5, 0.77, 0.9, 0.999, 1.0]),
    top_k=st.integers(0, 14),
)
def test_top_k_and_top_p_leave_the_sets_that_brute_force_finds(logits: list[float], top_p: float, top_k: int):
    ids, values = candidates(torch.tensor(logits), top_p, top_k)
    assert sorted(ids.tolist()) == brute_force_candidates(logits, top_p, top_k)
    assert values.tolist() == [logits[i] for i in ids]


def test_top_p_keeps_the_token_that_reaches_p():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert candidates(logits, 0.49, 0)[0].tolist() == [0]
    assert candidates(logits, 0.51, 0)[0].tolist() == [0, 1]
    assert candidates(logits, 0.79, 0)[0].tolist() == [0, 1]
    assert candidates(logits, 0.81, 0)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.9999])
def test_top_p_is_summed_precisely_over_a_large_vocabulary(top_p: float):
    logits = 2 * normal(20_000)
    ids, _ = candidates(logits, top_p, 0)
    assert sorted(ids.tolist()) == brute_force_candidates(logits.tolist(), top_p, 0)


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert candidates(logits, 0.55, 2)[0].tolist() == [0]  # 0.4 / 0.7 = 0.57
    assert candidates(logits, 0.55, 0)[0].tolist() == [0, 1]


def test_only_candidates_are_sampled_and_all_of_them():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert {sample(logits, top_k=2, seed=s) for s in range(60)} == {1, 3}
    assert {sample(logits, top_p=0.75, seed=s) for s in range(60)} == {1, 2, 3}
    assert {sample(logits, top_k=1, seed=s) for s in range(20)} == {1}
    assert {sample(logits, seed=s) for s in range(100)} == {0, 1, 2, 3}


def test_top_p_is_of_the_distribution_after_temperature():
    logits = torch.tensor([0.6, 0.4]).log()
    # 0.6⁴ / (0.6⁴ + 0.4⁴) = 0.84
    assert {sample(logits, temperature=0.25, top_p=0.8, seed=s) for s in range(40)} == {0}
    assert {sample(logits, temperature=1.0, top_p=0.8, seed=s) for s in range(40)} == {0, 1}


def test_a_draw_is_a_function_of_seed_and_index():
    logits = torch.zeros(1000)
    draws = {(s, i): sample(logits, seed=s, index=i) for s in range(10) for i in range(10)}
    assert draws == {(s, i): sample(logits, seed=s, index=i) for s, i in draws}
    assert len(set(draws.values())) > 80  # of 1000 equally likely ones
    assert draws[0, 1] != draws[1, 0]


def test_a_draw_does_not_depend_on_the_batch():
    logits = 2 * normal(40, 64)
    rows = [((0.0, 0.7, 1.3)[t % 3], (1.0, 0.9)[t % 2], (0, 5, 0, 20)[t % 4], t // 2, t) for t in range(40)]
    together = sample_rows(logits, rows)
    assert together == [sample_rows(logits[t : t + 1], [rows[t]])[0] for t in range(40)]
    assert together[::-1] == sample_rows(logits.flip(0), rows[::-1])


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_64_bit_seed_is_one(seed: int):
    assert 0 <= sample(torch.zeros(10), seed=seed, index=2**31) < 10
    assert gumbel_noise(seed, 0, torch.arange(10)).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-5, 1e6])
def test_extreme_temperatures(temperature: float):
    logits = torch.tensor([1.0, 3.0, 2.0])
    drawn = {sample(logits, temperature, top_p, seed=s) for s in range(50) for top_p in (0.9, 1.0)}
    assert drawn == ({1} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3)])
def test_draws_follow_the_distribution(temperature: float, top_k: int):
    """χ² over 4000 seeds (fixed, so this never fails by chance)."""
    logits, draws = torch.tensor([1.0, 0.0, -0.5, 0.7, -1.2]), 4000
    counts = Counter(
        sample_rows(logits.expand(draws, -1), [(temperature, 1.0, top_k, seed, 3) for seed in range(draws)])
    )
    kept = brute_force_candidates((logits / temperature).tolist(), 1.0, top_k)
    probabilities = (logits[kept] / temperature).softmax(-1).tolist()
    assert set(counts) == set(kept)
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in zip(kept, probabilities, strict=True))
    assert chi_square < 18.5  # 0.999 quantile of 4 degrees of freedom


def test_noise_over_tokens_indices_and_seeds_is_gumbel():
    """Mean γ, variance π²/6, and no correlation between neighbours, along each of the three counters."""
    ids = torch.arange(20_000)
    along_ids = gumbel_noise(5, 7, ids)
    along_index = torch.cat([gumbel_noise(5, i, ids[:1]) for i in range(5000)])
    along_seed = torch.cat([gumbel_noise(s, 7, ids[:1]) for s in range(5000)])
    for noise in (along_ids, along_index, along_seed):
        n = len(noise)
        assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * 1.2825 / n**0.5)
        assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=10 / n**0.5)
        centred = noise - noise.mean()
        assert abs(float((centred[1:] * centred[:-1]).mean() / noise.var())) < 4.5 / n**0.5


def splitmix_gumbel(seed: int, index: int, token: int) -> float:
    """The noise as gumbel_noise's docstring says it, in Python's integers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z &= mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    bits = mix(mix(mix(seed + golden) + golden * (index + 1)) + golden * token)
    return -math.log(-math.log(((bits >> 11) + 0.5) * 2.0**-53))


@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 2**40), token=st.integers(0, 2**20))
def test_noise_is_splitmix_in_64_bits(seed: int, index: int, token: int):
    assert float(gumbel_noise(seed, index, torch.tensor([token]))) == pytest.approx(
        splitmix_gumbel(seed, index, token), rel=1e-12
    )


GOLDEN: dict[tuple[int, int], list[float]] = {
    (0, 0): [1.0530590592834106, -0.6807578025137784, 3.529359741423534, -0.5034567376471419],
    (0, 1): [0.5726812128635543, -0.5269099359239319, 0.7553338674209825, -0.07283733046154081],
    (1, 0): [0.8635963628317398, 1.005158734781254, 3.552972585557601, -0.3874476124228737],
    (42, 1000): [1.6895509547237981, 1.2029700576268472, 1.6188008171407866, 3.3990977010384174],
    (-1, 7): [1.3533812600462019, 1.0361247911675548, 2.2709292093495774, 2.5997565052885565],
    (9223372036854775807, 2147483648): [
        0.6456764654809709,
        0.19818715100541442,
        0.5969294721898505,
        0.8062936351804938,
    ],
}


@pytest.mark.parametrize(("seed", "index"), GOLDEN)
def test_noise_never_changes(seed: int, index: int):
    """Another hash would give every seeded request other tokens: if this fails, it is the change that is wrong."""
    noise = gumbel_noise(seed, index, torch.tensor([0, 1, 2, 129_279]))
    assert noise.tolist() == pytest.approx(GOLDEN[seed, index], rel=1e-13)
