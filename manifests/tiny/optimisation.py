"""How the tiny model's weights move: Muon for the matrices, and cycles of the learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of the learning rates, with fresh optimisers.

    `knots` are (step, share of the peak rates), linear in between; the last one ends the cycle. Every `long_every`-th
    step takes long documents. From step `contexts_from` on, some of those sequences are one context; from
    `rounded_from` on, the weights are rounded to FP8. The correction bias follows the load averaged with weight
    `smoothing` for the newest step.
    """

    matrices: float
    others: float
    embedding: float
    knots: tuple[tuple[int, float], ...]
    contexts_from: int
    rounded_from: int
    long_every: int
    smoothing: float

    @property
    def steps(self) -> int:
        return self.knots[-1][0]

    def share(self, step: int) -> float:
        """The share of the peak rates at a step."""
        after = next(i for i, (knot, _) in enumerate(self.knots) if knot > step)
        (left, low), (right, high) = self.knots[after - 1], self.knots[after]
        return low + (high - low) * (step - left) / (right - left)

    def stretched(self, factor: float) -> Cycle:
        knots = tuple((round(step * factor), share) for step, share in self.knots)
        return replace(
            self,
            knots=knots,
            contexts_from=round(self.contexts_from * factor),
            rounded_from=round(self.rounded_from * factor),
        )


CYCLES = (
    Cycle(0.012, 3e-3, 3e-3, ((0, 0.025), (40, 1.0), (160, 1.0), (800, 0.0)), 400, 680, 5, 1.0),
    Cycle(0.008, 2e-3, 1e-2, ((0, 0.025), (40, 1.0), (180, 1.0), (600, 0.42), (680, 0.0)), 450, 640, 3, 0.1),
)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (Jordan et al., 2024), for stacks of matrices
    [..., R, C]."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.02):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).to(torch.bfloat16)
                tall = x.shape[-2] > x.shape[-1]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(x.float(), alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
