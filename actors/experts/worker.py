"""The routed experts that one group holds, and their computation. Knows nothing about links, Ray or requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.links.protocol import Dispatch, ExpertNotHeldError
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.config import ModelConfig
from isotherm.kernels.expert_bank import PackedExpert
from isotherm.kernels.ops import Kernels


class ExpertWorker:
    """Experts can be loaded and dropped by one thread while another computes: a slot is filled before it is named, and
    unnamed before it is emptied. `gate` is held while experts are computed and while one is named or unnamed; another
    who computes with this worker's bank takes it too.
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels, slots: int, gate: AbstractContextManager[object] | None = None
    ):
        self.config, self.kernels = config, kernels
        self.bank = kernels.expert_bank(slots, config.hidden_size, config.moe_intermediate_size)
        # [layer, expert]; -1: not held
        self.slot_of = np.full((config.cache_layers, config.n_routed_experts), -1, dtype=np.int32)
        self.rows_served = np.zeros_like(self.slot_of, dtype=np.int64)  # [layer, expert]: rows computed so far
        self.gate: AbstractContextManager[object] = gate or threading.Lock()
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        """How many experts are loaded, over all layers."""
        return int((self.slot_of >= 0).sum())

    def pairs(self) -> list[tuple[int, int]]:
        """The (layer, expert) pairs that are loaded, in order."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self.slot_of >= 0)]

    def holds(self, layer: int, expert: int) -> bool:
        return bool(self.slot_of[layer, expert] >= 0)

    def load(
        self,
        reader: WeightReader,
        experts: Iterable[tuple[int, int]],
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Load (layer, expert) pairs from the checkpoint; ones that are held already stay. Raises RuntimeError when no
        slot is free."""
        wanted = [pair for pair in dict.fromkeys(experts) if not self.holds(*pair)]
        with reader.ahead(name for pair in wanted for name in self.config.expert_projections(*pair)):
            for done, pair in enumerate(wanted, 1):
                self._load(reader, *pair)
                progress(done / len(wanted))

    def _load(self, reader: WeightReader, layer: int, expert: int) -> None:
        self._place(layer, expert, lambda slot: self.bank.load(slot, *reader.expert(layer, expert)))

    def packed(self, layer: int, expert: int) -> PackedExpert | None:
        """One expert for another group whose bank has this one's layout, or None where it is not held. It stays as it
        is while the result lives."""
        layers, experts = self.slot_of.shape
        if not (0 <= layer < layers and 0 <= expert < experts) or (slot := int(self.slot_of[layer, expert])) < 0:
            return None
        try:
            found = self.bank.packed(slot)
        except IndexError:  # dropped at this moment
            return None
        return found if self.slot_of[layer, expert] == slot else None

    def take(self, layer: int, expert: int, packed: PackedExpert) -> None:
        """Hold what another group has packed: the bank's `room`, filled. Raises ForeignBytesError, and RuntimeError
        when no slot is free."""
        self._place(layer, expert, lambda slot: self.bank.take(slot, packed))

    def _place(self, layer: int, expert: int, fill: Callable[[int], None]) -> None:
        if not self._free:
            raise RuntimeError(f"no free expert slot for layer {layer} expert {expert}")
        slot = self._free.pop()
        try:
            fill(slot)
        except BaseException:
            self._free.append(slot)
            raise
        with self.gate:
            self.slot_of[layer, expert] = slot

    def drop(self, layer: int, expert: int) -> None:
        """Forget one expert and free its memory, after the computation under way."""
        if not self.holds(layer, expert):
            raise ExpertNotHeldError(f"layer {layer} expert {expert} is not held")
        slot = int(self.slot_of[layer, expert])
        with self.gate:
            self.slot_of[layer, expert] = -1
            self.bank.drop(slot)
        self._free.append(slot)

    @torch.inference_mode()
    def compute(self, message: Dispatch) -> Tensor:
        """Unweighted outputs [P, D], one per pair in order. Raises ExpertNotHeldError, and IndexError on a layer or an
        expert that there is not."""
        self._check_numbers(message)
        with self.gate:
            slots = self.slot_of[message.layer, message.experts_A]
            if (slots < 0).any():
                missing = message.experts_A[slots < 0].tolist()
                raise ExpertNotHeldError(
                    f"layer {message.layer} experts {missing} are not held (placement version "
                    f"{message.placement_version})"
                )
            rows_P, slots_A, offsets_A1 = map(torch.from_numpy, (message.rows_P, slots, message.offsets_A1))
            output_PD = self.kernels.experts(message.x_UD, self.bank, rows_P, slots_A, offsets_A1)
            self.rows_served[message.layer, message.experts_A] += np.diff(message.offsets_A1)
            return output_PD

    def _check_numbers(self, message: Dispatch) -> None:
        """As the native server does: numpy would take those below 0 for the last ones."""
        layers, experts = self.slot_of.shape
        if not 0 <= message.layer < layers:
            raise IndexError(f"layer {message.layer} is not in 0 … {layers - 1}")
        unknown = message.experts_A[(message.experts_A < 0) | (message.experts_A >= experts)]
        if len(unknown):
            raise IndexError(f"expert {unknown[0]} does not exist")
