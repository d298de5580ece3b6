"""The attention shard's part of a forward pass, whatever the model's family, and the routed experts as it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from isotherm.actors.models.step_batch import StepBatch
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.ops import AttentionRows, DecoderLayer, Kernels, LinearWeight, Router

if TYPE_CHECKING:
    from isotherm.actors.models.mtp import MtpLayer


class RoutedExperts(Protocol):
    """The routed experts, wherever they are. One layer is under way at a time."""

    finding_fault: bool  # steps are computed to find the request that makes them fail: errors are raised at once
    patience: float  # seconds for which experts that are lost are waited for; may be changed between layers
    waited_seconds: float  # since the start, in which there was nothing to do but wait for expert groups

    def begin_step(self) -> None:
        """A step begins: rows will come for every MoE layer. Said again before each step."""

    def end_step(self) -> None:
        """No step follows for now."""

    def abandon(self) -> None:
        """The step under way has failed: nothing of it is to be left where the next one would meet it."""

    def bank_of(self, layer: int) -> tuple[ExpertBank, Tensor] | None:
        """Where all experts of a layer lie in one bank of this process: it, and what Kernels.moe calls slot_of_E, the
        same tensor as long as they do. None: they are elsewhere, and `moe` alone computes them."""

    def moe(
        self,
        layer: int,
        x_TD: Tensor,
        router: Router,
        gate_up: LinearWeight | None,
        down: LinearWeight | None,
        residual_TD: Tensor,
    ) -> Tensor:
        """residual + (Σ weight × expert + shared experts) → [T, D], as Kernels.moe says it."""

    def advance(
        self,
        layers: Sequence[DecoderLayer],
        first: int,
        begin: int,
        x_TD: Tensor,
        rows: AttentionRows,
        caches: Sequence[Tensor],
    ) -> tuple[int, Tensor] | None:
        """Compute decoder layers whose experts are elsewhere, one at least, from the one at `begin` on → the index of
        the next one, and what goes into it. `first`: the number that the first of all layers has in placements;
        `layers` is the same object as long as they are the same. x is written over. None, with nothing done, where
        that has to be done layer by layer."""


class AttentionModel(Protocol):
    """Weights of everything but the routed experts, and the forward pass over a paged cache. Shape suffixes as in
    kernels/ops.py. Whoever calls it sees to `torch.inference_mode`, once a step."""

    kernels: Kernels
    cos: Tensor  # float32 [positions, R/2], of rotary embedding; and its sine
    sin: Tensor
    mtp: MtpLayer | None  # where it is to draft

    def new_cache(self, blocks: int, block_size: int) -> list[Tensor]:
        """One zeroed cache per layer; the layer that drafts has its own."""

    def forward(self, batch: StepBatch, cache: list[Tensor], experts: RoutedExperts) -> Tensor:
        """The last layer's output [T, D]; writes into the cache what later rows need."""

    def logits(self, x_ND: Tensor) -> Tensor:
        """Float32 [N, V], of any rows that `forward` gave: each by itself."""
