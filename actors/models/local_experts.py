"""Routed experts in the process that has the rest of the model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.config import ModelConfig
from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.ops import Kernels, LinearWeight, Router


class LocalExperts:
    """All experts of the layers that are asked for lie in one bank: nothing to split, send and gather. `slot_of`: int32
    [layers, experts], the place of each in the bank, less than 0 where it is not there."""

    finding_fault = False
    patience = 0.0
    waited_seconds = 0.0

    def __init__(self, kernels: Kernels, bank: ExpertBank, slot_of: np.ndarray):
        self._kernels, self._bank = kernels, bank
        self._slots = torch.from_numpy(slot_of).to(kernels.device).unbind(0)

    @classmethod
    def of_layer(cls, config: ModelConfig, kernels: Kernels, reader: WeightReader, layer: int) -> LocalExperts:
        """One layer's, loaded."""
        experts = range(config.n_routed_experts)
        bank = kernels.expert_bank(len(experts), config.hidden_size, config.moe_intermediate_size)
        with reader.ahead(name for expert in experts for name in config.expert_projections(layer, expert)):
            for expert in experts:
                bank.load(expert, *reader.expert(layer, expert))
        slot_of = np.full((config.cache_layers, len(experts)), -1, dtype=np.int32)
        slot_of[layer] = experts
        return cls(kernels, bank, slot_of)

    def begin_step(self) -> None:
        pass

    def end_step(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def bank_of(self, layer: int) -> tuple[ExpertBank, Tensor]:
        return self._bank, self._slots[layer]

    def advance(self, *_: object) -> None: ...  # they are here

    def moe(
        self,
        layer: int,
        x_TD: Tensor,
        router: Router,
        gate_up: LinearWeight | None,
        down: LinearWeight | None,
        residual_TD: Tensor,
    ) -> Tensor:
        return self._kernels.moe(x_TD, router, self._bank, self._slots[layer], gate_up, down, residual_TD)


def draft_experts(config: ModelConfig, kernels: Kernels, reader: WeightReader) -> LocalExperts | None:
    """The experts of the layer that guesses, where they are so small that a shard has them beside those that expert
    groups hold: all guesses of a step are one call then, where each would be a message to every group and back."""
    layer = config.kept_draft_layer
    return None if layer is None else LocalExperts.of_layer(config, kernels, reader, layer)
