"""The routed experts of one worker, in slots, and packed experts on their way between workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from isotherm.kernels.formats.stored import StoredWeight


class ForeignBytesError(ValueError):
    """Bytes that came from elsewhere are no packed expert's of this bank."""


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """One expert as a bank keeps it, or room for one. `parts` are its bytes where they lie, valid while this object
    lives; `form`, which can be written as JSON, says what they are to another bank of the same layout."""

    form: Any
    parts: list[memoryview]
    owner: Any  # the backend's own


class ExpertBank(ABC):
    """The routed experts that one worker holds, in numbered slots that can be filled and emptied while the worker runs.

    All slots have one shape: gate and up [inner, hidden], down [hidden, inner]. An empty slot holds no weight memory.
    """

    @abstractmethod
    def load(self, slot: int, gate: StoredWeight, up: StoredWeight, down: StoredWeight) -> None:
        """Pack one expert into `slot` (0 ≤ slot < slots), replacing what was there."""

    # Banks that say the same can take each other's packed experts, to the bit. None: those of this bank stay here.
    layout: str | None = None

    def packed(self, slot: int) -> PackedExpert:
        """What the slot holds, for another bank of this layout; it stays as it is while the result lives."""
        raise NotImplementedError(f"{type(self).__name__} has no layout that others could take")

    def room(self, form: Any) -> PackedExpert:
        """Room for another bank's packed expert, to be filled; it is in no slot. Raises ForeignBytesError."""
        raise NotImplementedError(f"{type(self).__name__} has no layout that others could take")

    def take(self, slot: int, expert: PackedExpert) -> None:
        """Put what `room` gave, and what has been filled since, into a slot. Raises ForeignBytesError."""
        raise NotImplementedError(f"{type(self).__name__} has no layout that others could take")

    @abstractmethod
    def drop(self, slot: int) -> None:
        """Free the slot's memory; later use of it without a load is an error."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of packed weights held now."""
