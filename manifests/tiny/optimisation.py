"""How the tiny model's weights move: Muon for the matrices, AdamW for the rest, and rates that rise, stay, and fall
whenever a model is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rates:
    """Peak learning rates by what they move. They rise over `warm_up` steps to `peak` times these and then stay."""

    matrices: float = 0.01
    others: float = 2e-3
    embedding: float = 5e-3
    warm_up: int = 50
    peak: float = 1.0

    def share(self, step: int, decay: tuple[int, int] | None) -> float:
        """The share of the peaks at a step; `decay` is the step that a fall to nothing begins at, and its length."""
        rising = self.peak * min(1.0, (step + 1) / self.warm_up)
        return rising if decay is None else rising * max(0.0, 1 - (step - decay[0]) / decay[1])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (Jordan et al., 2024), for stacks of matrices
    [..., R, C]. Matrices of one size are taken together, whatever they belong to: products of many small ones cost
    their overhead once. `dtype`: what the products are computed in."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, decay=decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            sizes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).to(self.dtype)
                x = x.mT if _tall(p) else x
                sizes.setdefault((x.shape[-2], x.shape[-1]), []).append((p, x))
            for (rows, columns), members in sizes.items():
                stacks = [x.reshape(-1, rows, columns) for _, x in members]
                updates = orthogonal(torch.cat(stacks)).float().split([len(x) for x in stacks])
                for (p, x), update in zip(members, updates, strict=True):
                    update = update.view(x.shape)
                    p.mul_(1 - group["lr"] * group["decay"])
                    ratio = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                    p.add_(update.mT if _tall(p) else update, alpha=-group["lr"] * ratio)


def _tall(p: Tensor) -> bool:
    return p.shape[-2] > p.shape[-1]


def orthogonal(x: Tensor) -> Tensor:
    """x [N, R, C], R ≤ C: each matrix with its singular values brought near 1."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
