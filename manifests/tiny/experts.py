"""Routed experts for training: rows sorted by expert, so that each expert is one product over its own rows.

Shapes: T tokens, K experts a token, E experts, H hidden, I expert width; R rows: the T·K pairs by expert, each expert's
filled up to a multiple of BLOCK.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fusion import fused
from torch import Tensor

BLOCK = 128  # rows; so products have few distinct sizes, which kernels and allocators keep things by


class Order(NamedTuple):
    """Where pairs lie among the rows. slots [T, K]: each pair's row. tokens [R]: each row's token; any, where the row
    only fills up. sizes [E]: each expert's rows."""

    slots: Tensor
    tokens: Tensor
    sizes: list[int]


def by_expert(ids: Tensor, experts: int) -> tuple[Order, Tensor]:
    """ids [T, K] → the order of their pairs, and how many pairs each expert has, [E]."""
    flat = ids.flatten()
    load = torch.bincount(flat, minlength=experts)
    sizes = (load + BLOCK - 1) // BLOCK * BLOCK
    order = flat.argsort(stable=True)
    sorted_ids = flat[order]
    filled_up = (sizes - load).cumsum(0) - (sizes - load)  # rows before an expert's that are no pairs
    rows = torch.arange(len(flat), device=ids.device) + filled_up[sorted_ids]
    slots = torch.empty_like(flat)
    slots[order] = rows
    tokens = torch.zeros(int(sizes.sum()), dtype=torch.long, device=ids.device)
    tokens[rows] = order // ids.shape[1]
    return Order(slots.view(ids.shape), tokens, sizes.tolist()), load


@fused
def gated(gate_up: Tensor, weights: Tensor) -> Tensor:
    """gate_up [R, 2 I], weights [R] → weights · silu(gate) · up [R, I]."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up * weights[:, None]).to(gate_up.dtype)


@fused
def gated_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gated`'s two inputs, by that of its output."""
    (gate, up), grad = gate_up.float().chunk(2, -1), grad.float()
    sigmoid = gate.sigmoid()
    silu, scaled = gate * sigmoid, grad * weights[:, None]
    d_gate = scaled * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((d_gate, scaled * silu), -1).to(gate_up.dtype), (grad * silu * up).sum(-1)


class Routed(torch.autograd.Function):
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)). Rows that only fill up have weight 0: they add
    nothing to any sum, in neither direction, whatever they hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
        """x [T, H], weights [T, K], gate_up [E, 2 I, H], down [E, H, I] → [T, H]."""
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        rows = x.index_select(0, order.tokens)
        of_rows = torch.zeros(len(rows), device=x.device)
        of_rows[order.slots.flatten()] = weights.flatten().float()
        hidden = rows.new_empty(len(rows), gate_up.shape[1])
        _each(order.sizes, lambda at, e: torch.mm(rows[at], gate_up[e].T, out=hidden[at]))
        out = torch.empty_like(rows)
        inner = gated(hidden, of_rows)
        _each(order.sizes, lambda at, e: torch.mm(inner[at], down[e].T, out=out[at]))
        ctx.save_for_backward(rows, of_rows, hidden, gate_up, down)
        ctx.order, ctx.kind = order, weights.dtype
        return F.embedding_bag(order.slots, out, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        rows, of_rows, hidden, gate_up, down = ctx.saved_tensors
        order, grad = ctx.order, grad.to(rows.dtype).index_select(0, ctx.order.tokens)
        inner, d_inner = gated(hidden, of_rows), rows.new_empty(len(rows), down.shape[2])
        d_down, d_gate_up, d_rows = torch.empty_like(down), torch.empty_like(gate_up), torch.empty_like(rows)

        def through_down(at: slice, e: int) -> None:
            torch.mm(grad[at], down[e], out=d_inner[at])
            torch.mm(grad[at].T, inner[at], out=d_down[e])

        _each(order.sizes, through_down)
        d_hidden, d_of_rows = gated_backward(hidden, of_rows, d_inner)

        def through_gate_up(at: slice, e: int) -> None:
            torch.mm(d_hidden[at], gate_up[e], out=d_rows[at])
            torch.mm(d_hidden[at].T, rows[at], out=d_gate_up[e])

        _each(order.sizes, through_gate_up)
        d_weights = d_of_rows[order.slots].to(ctx.kind)
        return F.embedding_bag(order.slots, d_rows, mode="sum"), d_weights, d_gate_up.float(), d_down.float(), None


def _each(sizes: list[int], product: Any) -> None:
    at = 0
    for e, size in enumerate(sizes):
        product(slice(at, at + size), e)
        at += size
