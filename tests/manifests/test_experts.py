"""The bundled model's routed experts in training, beside a plain statement of them, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny_recipe import tiny_recipe
from torch import Tensor

Module = Callable[[str], ModuleType]
EXPERTS, HIDDEN, INNER = 5, 12, 8


@pytest.fixture(scope="module")
def recipe() -> Iterator[Module]:
    with tiny_recipe() as module:
        yield module


def plain(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = []
    for t in range(len(x)):
        total = torch.zeros(HIDDEN)
        for k, e in enumerate(ids[t].tolist()):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            total = total + weights[t, k] * (down[e] @ (F.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("tokens", [1, 40, 400])
def test_routed_experts_and_their_gradients(recipe: Module, tokens: int):
    """One expert has no row, one many."""
    experts = recipe("experts")
    torch.manual_seed(tokens)
    x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(tokens)])
    ids[: tokens // 2] = torch.tensor([3, 1])
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    towards = torch.randn(tokens, HIDDEN)
    outputs, gradients = [], []
    order, load = experts.by_expert(ids, EXPERTS)
    for function in (
        lambda *given: experts.Routed.apply(*given, order),
        lambda x, *given: plain(x, ids, *given),
    ):
        given = [one.clone().requires_grad_() for one in (x, weights, gate_up, down)]
        out = function(*given)
        (out * towards).sum().backward()
        outputs.append(out.detach())
        gradients.append([one.grad for one in given])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for ours, stated in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stated, rtol=1e-3, atol=1e-3)
    assert load.tolist() == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist() and load[EXPERTS - 1] == 0
    assert all(size % experts.BLOCK == 0 for size in order.sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch compiles with
def test_compiled_functions_give_what_they_give_operation_by_operation(recipe: Module):
    experts, fusion = recipe("experts"), recipe("fusion")
    torch.manual_seed(0)
    given = torch.randn(300, 2 * INNER), torch.rand(300)
    fusion.Fusion.on = True
    try:
        compiled = experts.gated(*given)
    finally:
        fusion.Fusion.on = False
    torch.testing.assert_close(compiled, experts.gated(*given))
