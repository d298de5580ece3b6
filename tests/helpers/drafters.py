"""Drafters of the tests: what they guess is up to the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotherm.cluster.engine.sequence import Chunk, ScheduledSequence
from isotherm.cluster.engine.speculation import Speculation


class Guesser:
    """Guesses for one sequence after the other, by `guess`."""

    kind, passes, looks_back = "ngram", (), 0

    def guess(self, sequence: ScheduledSequence, most: int) -> Sequence[int]:
        raise NotImplementedError

    def most(self, sequence: ScheduledSequence, room: int) -> int:
        return room

    def draft(self, asked: Sequence[tuple[ScheduledSequence, int]]) -> list[Sequence[int]]:
        return [self.guess(sequence, most) for sequence, most in asked]

    def computed(self, chunks: Sequence[Chunk], rows_TD: Any) -> None:
        pass


def always(drafter: Guesser, tokens: int = 5) -> Speculation:
    """As many drafts as there can be, in every step."""
    return Speculation(drafter, tokens)
